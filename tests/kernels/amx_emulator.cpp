// SPDX-License-Identifier: Apache-2.0
#include "tests/kernels/amx_emulator.h"

#if defined(__x86_64__) && defined(__linux__)
#include <immintrin.h>
#include <signal.h>
#include <ucontext.h>

#include <array>
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <optional>

namespace gdn::amx_emulator {
namespace {

constexpr size_t kTiles = 8, kMaxRows = 16, kMaxBytes = 64;

enum class Operation { kConfigure, kRelease, kZero, kLoad, kLoadT1, kStore, kProduct };
constexpr const char* kNames[] = {"ldtilecfg",   "tilerelease", "tilezero", "tileloadd",
                                  "tileloaddt1", "tilestored",  "tdpbf16ps"};

struct Instruction {
  Operation operation;
  size_t length;
  size_t reg, rm, vvvv;  // tiles
  uint8_t* memory;       // of an operand there, its first row
  int64_t stride;        // from row to row
};

struct Tile {
  size_t rows, bytes;  // configured; 0: not
  alignas(64) uint8_t data[kMaxRows][kMaxBytes];
};

struct Tiles {
  bool configured;
  Tile tiles[kTiles];
};

constinit thread_local Tiles tiles_of_thread = {};

std::atomic<uint64_t> executed[std::size(kNames)];
std::atomic<int> configured{0};
struct sigaction former;

[[noreturn]] __attribute__((format(printf, 2, 3))) void fault(const Instruction& x,
                                                              const char* format, ...) {
  std::fprintf(stderr, "amx_emulator: %s: ", kNames[static_cast<size_t>(x.operation)]);
  va_list args;
  va_start(args, format);
  std::vfprintf(stderr, format, args);
  va_end(args);
  std::fputc('\n', stderr);
  std::abort();
}

// --- decoding ---

using Registers = decltype(mcontext_t::gregs);

constexpr int kGeneral[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                              REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                              REG_R12, REG_R13, REG_R14, REG_R15};

// Which instruction it is, by opcode, mandatory prefix (0: none, 1: 66, 2: F3, 3: F2) and ModRM.
std::optional<Operation> operation_of(uint8_t opcode, int prefix, uint8_t modrm) {
  const bool memory = modrm >> 6 != 3;
  const int reg = modrm >> 3 & 7, rm = modrm & 7;
  if (opcode == 0x49) {
    if (prefix == 0 && memory && reg == 0) return Operation::kConfigure;
    if (prefix == 0 && modrm == 0xc0) return Operation::kRelease;
    if (prefix == 3 && !memory && rm == 0) return Operation::kZero;
  }
  if (opcode == 0x4b && memory && rm == 4) {  // only with a SIB byte
    if (prefix == 3) return Operation::kLoad;
    if (prefix == 1) return Operation::kLoadT1;
    if (prefix == 2) return Operation::kStore;
  }
  if (opcode == 0x5c && prefix == 2 && !memory) return Operation::kProduct;
  return std::nullopt;
}

// ModRM's operand in memory: base + displacement, and index * scale as the distance of rows.
// `at` points behind ModRM and moves to the end of the instruction.
void find_memory(const Registers& registers, uint8_t modrm, size_t more_index, size_t more_base,
                 const uint8_t*& at, Instruction& x) {
  const int mod = modrm >> 6;
  uint64_t address = 0;
  bool displacement = mod == 2, from_next = false;
  if ((modrm & 7) == 4) {
    const uint8_t sib = *at++;
    const size_t index = (sib >> 3 & 7) | more_index, base = (sib & 7) | more_base;
    if (index != 4) x.stride = registers[kGeneral[index]] * (int64_t{1} << (sib >> 6));
    if ((sib & 7) == 5 && mod == 0) {
      displacement = true;
    } else {
      address = static_cast<uint64_t>(registers[kGeneral[base]]);
    }
  } else if ((modrm & 7) == 5 && mod == 0) {
    displacement = from_next = true;
  } else {
    address = static_cast<uint64_t>(registers[kGeneral[(modrm & 7) | more_base]]);
  }
  if (mod == 1) address += static_cast<uint64_t>(int64_t{static_cast<int8_t>(*at++)});
  if (displacement) {
    int32_t value;
    std::memcpy(&value, at, sizeof(value));
    at += sizeof(value);
    address += static_cast<uint64_t>(int64_t{value});
  }
  if (from_next) address += reinterpret_cast<uint64_t>(at);
  x.memory = reinterpret_cast<uint8_t*>(address);
}

// C4, then R X B inverted and the map 0F38, then W, vvvv inverted, L and the prefix.
std::optional<Instruction> decode(const Registers& registers) {
  const auto* start = reinterpret_cast<const uint8_t*>(registers[REG_RIP]);
  if (start[0] != 0xc4 || (start[1] & 0x1f) != 2) return std::nullopt;
  const uint8_t rxb = ~start[1], last = start[2], opcode = start[3];
  if (opcode != 0x49 && opcode != 0x4b && opcode != 0x5c) return std::nullopt;
  const uint8_t modrm = start[4];
  const auto operation = operation_of(opcode, last & 3, modrm);
  const size_t vvvv = ~last >> 3 & 15;
  const bool wide = (last & 0x84) != 0;  // W or L
  if (!operation || wide || (*operation != Operation::kProduct && vvvv != 0)) return std::nullopt;
  const size_t r = rxb >> 7 << 3, index = (rxb >> 6 & 1) << 3, b = (rxb >> 5 & 1) << 3;
  Instruction x = {*operation, 0, (modrm >> 3 & 7) | r, (modrm & 7) | b, vvvv, nullptr, 0};
  const uint8_t* at = start + 5;
  if (modrm >> 6 != 3) find_memory(registers, modrm, index, b, at, x);
  x.length = static_cast<size_t>(at - start);
  return x;
}

// --- execution ---

void set_configured(bool on) {
  if (tiles_of_thread.configured != on) configured += on ? 1 : -1;
  tiles_of_thread.configured = on;
}

void release() {
  std::memset(tiles_of_thread.tiles, 0, sizeof(tiles_of_thread.tiles));
  set_configured(false);
}

void configure(const Instruction& x) {
  uint8_t bytes[64];
  std::memcpy(bytes, x.memory, sizeof(bytes));
  const int palette = bytes[0];
  if (palette == 0) return release();
  if (palette != 1) fault(x, "palette %d does not exist", palette);
  if (bytes[1] != 0) fault(x, "start_row is %d, of an interrupted instruction", bytes[1]);
  for (size_t i = 0; i < sizeof(bytes); ++i) {
    const bool reserved = (i >= 2 && i < 16) || (i >= 32 && i < 48) || i >= 56;
    if (reserved && bytes[i] != 0) fault(x, "reserved byte %zu is %d", i, bytes[i]);
  }
  Tiles next = {};
  for (size_t i = 0; i < kTiles; ++i) {
    Tile& tile = next.tiles[i];
    tile.rows = bytes[48 + i];
    tile.bytes = bytes[16 + 2 * i] | size_t{bytes[17 + 2 * i]} << 8;
    if (tile.rows > kMaxRows || tile.bytes > kMaxBytes || (tile.rows == 0) != (tile.bytes == 0)) {
      fault(x, "tile %zu cannot have %zu rows of %zu bytes", i, tile.rows, tile.bytes);
    }
  }
  std::memcpy(tiles_of_thread.tiles, next.tiles, sizeof(next.tiles));
  set_configured(true);
}

Tile& tile(const Instruction& x, size_t i) {
  if (!tiles_of_thread.configured) fault(x, "tiles are not configured on this thread");
  if (i >= kTiles) fault(x, "there is no tile %zu", i);
  Tile& t = tiles_of_thread.tiles[i];
  if (t.rows == 0) fault(x, "tile %zu is not configured", i);
  if (t.bytes % 4 != 0) fault(x, "tile %zu has rows of %zu bytes, no multiple of 4", i, t.bytes);
  return t;
}

void load(const Instruction& x) {
  Tile& t = tile(x, x.reg);
  std::memset(t.data, 0, sizeof(t.data));
  const uint8_t* row = x.memory;
  for (size_t i = 0; i < t.rows; ++i, row += x.stride) std::memcpy(t.data[i], row, t.bytes);
}

void store(const Instruction& x) {
  const Tile& t = tile(x, x.reg);
  uint8_t* row = x.memory;
  for (size_t i = 0; i < t.rows; ++i, row += x.stride) std::memcpy(row, t.data[i], t.bytes);
}

// C += A B. Even and odd members of pairs have sums of their own over the depth, by fused multiply
// and add from 0; C gets the sum of both. All round to nearest even, with subnormal numbers taken
// and given as 0, as MXCSR has been set to; NaN and infinity as usual.
__attribute__((noinline, target("avx512f"))) void product(Tile& c, const Tile& a, const Tile& b) {
  const __mmask16 columns = static_cast<__mmask16>((1u << c.bytes / 4) - 1);
  using Words = uint32_t __attribute__((vector_size(64)));
  constexpr uint32_t upper = 0xffff0000u;
  for (size_t i = 0; i < c.rows; ++i) {
    __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
    for (size_t k = 0; k < a.bytes / 4; ++k) {
      int32_t two;
      std::memcpy(&two, a.data[i] + 4 * k, sizeof(two));
      const __m512i pair = _mm512_set1_epi32(two), row = _mm512_load_si512(b.data[k]);
      even = _mm512_fmadd_ps((__m512)((Words)pair << 16), (__m512)((Words)row << 16), even);
      odd = _mm512_fmadd_ps((__m512)((Words)pair & upper), (__m512)((Words)row & upper), odd);
    }
    const __m512 sum = _mm512_add_ps(even, odd);
    _mm512_store_ps(c.data[i], _mm512_maskz_add_ps(columns, _mm512_load_ps(c.data[i]), sum));
  }
}

void multiply(const Instruction& x) {
  Tile &c = tile(x, x.reg), &a = tile(x, x.rm), &b = tile(x, x.vvvv);
  if (&c == &a || &a == &b || &c == &b) {
    fault(x, "tiles %zu, %zu and %zu are not different", x.reg, x.rm, x.vvvv);
  }
  if (c.rows != a.rows || c.bytes != b.bytes || a.bytes / 4 != b.rows) {
    fault(x, "%zu x %zu bytes cannot be %zu x %zu by %zu x %zu", c.rows, c.bytes, a.rows, a.bytes,
          b.rows, b.bytes);
  }
  constexpr unsigned kMaskedNearestEven = 0x1f80, kFlush = 0x8040;
  _mm_setcsr(kMaskedNearestEven | kFlush);  // the handler's own; the thread gets its value back
  product(c, a, b);
}

void execute(const Instruction& x) {
  switch (x.operation) {
    case Operation::kConfigure:
      configure(x);
      break;
    case Operation::kRelease:
      release();
      break;
    case Operation::kZero: {
      Tile& t = tile(x, x.reg);
      std::memset(t.data, 0, sizeof(t.data));
      break;
    }
    case Operation::kLoad:
    case Operation::kLoadT1:
      load(x);
      break;
    case Operation::kStore:
      store(x);
      break;
    case Operation::kProduct:
      multiply(x);
      break;
  }
  executed[static_cast<size_t>(x.operation)].fetch_add(1, std::memory_order_relaxed);
}

void on_illegal_instruction(int signal, siginfo_t* info, void* context) {
  auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  if (const auto instruction = decode(registers)) {
    execute(*instruction);
    registers[REG_RIP] += static_cast<greg_t>(instruction->length);
  } else if ((former.sa_flags & SA_SIGINFO) != 0) {
    former.sa_sigaction(signal, info, context);
  } else if (former.sa_handler != SIG_DFL && former.sa_handler != SIG_IGN) {
    former.sa_handler(signal);
  } else {
    sigaction(SIGILL, &former, nullptr);  // what comes back to the instruction ends there
  }
}

bool has_amx() {
  uint32_t a = 7, b = 0, c = 0, d = 0;
  asm volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  constexpr uint32_t kTile = 1u << 24;
  return (d & kTile) != 0;
}

uint64_t executed_of(Operation operation) { return executed[static_cast<size_t>(operation)]; }

}  // namespace

bool install() {
  static const bool installed = [] {
    if (!__builtin_cpu_supports("avx512f") || has_amx()) return false;
    struct sigaction action = {};
    action.sa_sigaction = on_illegal_instruction;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    return sigaction(SIGILL, &action, &former) == 0;
  }();
  return installed;
}

Counts counts() {
  return {executed_of(Operation::kConfigure),
          executed_of(Operation::kRelease),
          executed_of(Operation::kLoad) + executed_of(Operation::kLoadT1),
          executed_of(Operation::kStore),
          executed_of(Operation::kZero),
          executed_of(Operation::kProduct)};
}

int configured_threads() { return configured; }

}  // namespace gdn::amx_emulator

#else

namespace gdn::amx_emulator {

bool install() { return false; }
Counts counts() { return {}; }
int configured_threads() { return 0; }

}  // namespace gdn::amx_emulator

#endif
