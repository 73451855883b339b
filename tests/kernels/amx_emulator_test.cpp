// SPDX-License-Identifier: Apache-2.0
// AMX's instructions as the emulator runs them, or as the CPU does where it has them, against a
// model in plain C++ of what Intel's manual says.
#include "tests/kernels/amx_emulator.h"

#include <gtest/gtest.h>

#if defined(__x86_64__) && defined(__linux__)
#include <immintrin.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <thread>
#include <vector>

#include "gdn/base/rng.h"
#include "gdn/kernels/simd/pairs.h"

namespace gdn {
namespace {

struct alignas(64) Config {
  uint8_t bytes[64] = {1};
  Config& tile(size_t i, size_t rows, size_t columns) {  // columns in bytes
    bytes[16 + 2 * i] = static_cast<uint8_t>(columns);
    bytes[17 + 2 * i] = static_cast<uint8_t>(columns >> 8);
    bytes[48 + i] = static_cast<uint8_t>(rows);
    return *this;
  }
  Config& byte(size_t i, uint8_t value) {
    bytes[i] = value;
    return *this;
  }
};

// Assembled here, not by intrinsics: those of GCC 12 do not tell the compiler what they read.
void load_config(const Config& c) { asm volatile("ldtilecfg %0" : : "m"(c)); }
void release() { asm volatile("tilerelease"); }
template <int kTile>
void load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
void store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
void zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}
// Intel's order of operands: c += a b.
template <int kC, int kA, int kB>
void multiply() {
  asm volatile(".intel_syntax noprefix\n\ttdpbf16ps tmm%c0, tmm%c1, tmm%c2\n\t.att_syntax prefix"
               :
               : "i"(kC), "i"(kA), "i"(kB));
}

float to_fp32(uint16_t bf16) { return std::bit_cast<float>(uint32_t{bf16} << 16); }
float flush(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

// C[m][n] += A[m][k] B[k][n], k and n counting pairs: a double loop over rows and columns.
void model(size_t m, size_t n, size_t k, const std::vector<uint16_t>& a,
           const std::vector<uint16_t>& b, std::vector<float>& c) {
  for (size_t i = 0; i < m; ++i) {
    for (size_t j = 0; j < n; ++j) {
      float sums[2] = {0, 0};
      for (size_t l = 0; l < k; ++l) {
        for (size_t member : {0, 1}) {
          const float x = flush(to_fp32(a[2 * (i * k + l) + member]));
          const float y = flush(to_fp32(b[2 * (l * n + j) + member]));
          sums[member] = flush(std::fma(x, y, sums[member]));
        }
      }
      c[i * n + j] = flush(flush(c[i * n + j]) + flush(sums[0] + sums[1]));
    }
  }
}

class AmxInstructions : public testing::Test {
 protected:
  void SetUp() override {
    // find_pair_kernels asks Linux for the tiles.
    if (!amx_emulator::install() && find_pair_kernels("amx") == nullptr) {
      GTEST_SKIP() << "neither AMX nor AVX-512 here";
    }
  }
  void TearDown() override {
    if (!IsSkipped()) release();
  }
};

// Random bf16 numbers of all sizes that products hold, some of them subnormal.
std::vector<uint16_t> random_bf16(Rng& rng, size_t n, bool whole_range) {
  std::vector<uint16_t> v(n);
  for (auto& x : v) {
    const double scale = whole_range ? std::exp2(std::floor(rng.uniform() * 190.0) - 135.0) : 1.0;
    x = static_cast<uint16_t>(std::bit_cast<uint32_t>(static_cast<float>(rng.normal() * scale)) >>
                              16);
  }
  return v;
}

// Rows of `width` bytes into rows `stride` apart, between bytes of 0xa5.
template <typename T>
std::vector<uint8_t> spread(const std::vector<T>& rows, size_t width, size_t stride) {
  const size_t count = rows.size() * sizeof(T) / width;
  std::vector<uint8_t> out(count * stride, 0xa5);
  for (size_t i = 0; i < count; ++i) {
    std::memcpy(out.data() + i * stride, reinterpret_cast<const uint8_t*>(rows.data()) + i * width,
                width);
  }
  return out;
}

template <int kC, int kA, int kB>
void check_product(size_t m, size_t n, size_t k, bool whole_range) {
  Rng rng(m * 10000 + n * 100 + k);
  const auto a = random_bf16(rng, 2 * m * k, whole_range);
  const auto b = random_bf16(rng, 2 * k * n, whole_range);
  std::vector<float> c(m * n);
  for (float& x : c) x = static_cast<float>(rng.normal());
  const size_t a_stride = 4 * k + 12, b_stride = 4 * n + 64, c_stride = 4 * n + 20;
  const auto a_rows = spread(a, 4 * k, a_stride), b_rows = spread(b, 4 * n, b_stride);
  auto c_rows = spread(c, 4 * n, c_stride);
  load_config(Config().tile(kC, m, 4 * n).tile(kA, m, 4 * k).tile(kB, k, 4 * n));
  load<kC>(c_rows.data(), c_stride);
  load<kA>(a_rows.data(), a_stride);
  load<kB>(b_rows.data(), b_stride);
  multiply<kC, kA, kB>();
  store<kC>(c_rows.data(), c_stride);
  model(m, n, k, a, b, c);
  EXPECT_EQ(c_rows, spread(c, 4 * n, c_stride)) << m << "x" << n << "x" << k;
}

TEST_F(AmxInstructions, ProductIsThatOfTheManual) {
  const size_t sizes[][3] = {{16, 16, 16}, {3, 5, 7},  {1, 1, 1},
                             {16, 1, 9},   {2, 16, 1}, {9, 4, 15}};
  for (const auto& [m, n, k] : sizes) {
    check_product<0, 1, 2>(m, n, k, false);
    check_product<5, 7, 6>(m, n, k, true);
    check_product<2, 0, 4>(m, n, k, true);
  }
}

// Subnormal numbers count as 0, on the way in and out, and rounding is to nearest even, whatever
// MXCSR says; and it is not touched.
TEST_F(AmxInstructions, RoundingDoesNotDependOnTheThread) {
  // In pairs of one member that is not 0: a = 1 and 2^100, b = 2^-24 twice, a subnormal number and
  // plus and minus the smallest normal one.
  const std::array<uint32_t, 2> a = {0x3f800000, 0x71800000};
  const std::array<uint32_t, 5> b = {0x33800000, 0x33800000, 0x00400000, 0x80800000, 0x00800000};
  // 1 + 2^-24 and 1 + 3 * 2^-24 are half way between two numbers.
  const std::array<float, 10> before = {1.0f, 1.0f + 0x1p-23f, 0x1p-130f, 0x1.8p-126f, 0x1p-130f};
  const std::array<float, 10> after = {1.0f,    1.0f + 0x1p-22f, 0.0f, 0.0f,      0x1p-126f,
                                       0x1p76f, 0x1p76f,         0.0f, -0x1p-26f, 0x1p-26f};
  const unsigned usual = _mm_getcsr();
  for (const unsigned mode : {0x1f80u, 0x5f80u, 0x7f80u, 0x9fc0u}) {
    auto c = before;
    _mm_setcsr(mode);
    load_config(Config().tile(0, 2, 20).tile(1, 2, 4).tile(2, 1, 20));
    load<1>(a.data(), 4);
    load<2>(b.data(), 20);
    load<0>(c.data(), 20);
    multiply<0, 1, 2>();
    store<0>(c.data(), 20);
    const unsigned left = _mm_getcsr();
    _mm_setcsr(usual);
    EXPECT_EQ(left, mode);
    EXPECT_EQ(c, after) << mode;
  }
}

// Nothing outside of the configured rows and columns is touched: here it is not mapped.
TEST_F(AmxInstructions, TilesMayEndWithAPage) {
  constexpr size_t kRows = 3, kBytes = 20;
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* pages = mmap(nullptr, 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(pages, MAP_FAILED);
  auto* end = static_cast<uint8_t*>(pages) + page;
  ASSERT_EQ(mprotect(end, page, PROT_NONE), 0);
  std::memset(end - kRows * kBytes, 0x5a, kRows * kBytes);
  load_config(Config().tile(0, kRows, kBytes));
  load<0>(end - kRows * kBytes, kBytes);
  std::memset(end - kRows * kBytes, 0, kRows * kBytes);
  store<0>(end - kRows * kBytes, kBytes);
  for (size_t i = 1; i <= kRows * kBytes; ++i) EXPECT_EQ(*(end - i), 0x5a) << i;
  munmap(pages, 2 * page);
}

TEST_F(AmxInstructions, ConfiguringAndZeroingClear) {
  const Config config = Config().tile(3, 4, 20).tile(6, 1, 64);
  const std::vector<uint8_t> ones(4 * 20, 0xff), zeros(4 * 20, 0);
  auto out = ones;
  load_config(config);
  load<3>(ones.data(), 20);
  zero<6>();
  store<3>(out.data(), 20);
  EXPECT_EQ(out, ones);
  zero<3>();
  store<3>(out.data(), 20);
  EXPECT_EQ(out, zeros);
  load<3>(ones.data(), 20);
  load_config(config);
  store<3>(out.data(), 20);
  EXPECT_EQ(out, zeros);
}

// Every form of an address: registers of both halves, scales, displacements of both sizes.
#define ADDRESS(base, index, operand)                                                         \
  [](const uint8_t* from, int64_t stride) {                                                   \
    asm volatile("mov %0, %%" base "\n\tmov %1, %%" index "\n\ttileloadd " operand ", %%tmm1" \
                 :                                                                            \
                 : "r"(from), "r"(stride)                                                     \
                 : base, index, "memory");                                                    \
  }

TEST_F(AmxInstructions, Addresses) {
  struct Form {
    void (*load)(const uint8_t* from, int64_t stride);
    int64_t offset, scale;
  };
  const Form forms[] = {
      {ADDRESS("rax", "rcx", "(%%rax,%%rcx,1)"), 0, 1},
      {ADDRESS("rdx", "rbx", "(%%rdx,%%rbx,2)"), 0, 2},
      {ADDRESS("rsi", "rdi", "(%%rsi,%%rdi,4)"), 0, 4},
      {ADDRESS("r8", "r9", "(%%r8,%%r9,8)"), 0, 8},
      {ADDRESS("r10", "rax", "5(%%r10,%%rax,1)"), 5, 1},
      {ADDRESS("rcx", "r12", "-128(%%rcx,%%r12,2)"), -128, 2},
      {ADDRESS("r13", "r14", "(%%r13,%%r14,1)"), 0, 1},  // only with a displacement of 0
      {ADDRESS("r12", "r15", "300(%%r12,%%r15,1)"), 300, 1},
      {ADDRESS("r15", "r11", "-1000(%%r15,%%r11,4)"), -1000, 4},
      {ADDRESS("r11", "r10", "7(%%r11)"), 7, 0},  // without an index all rows are the first
      {[](const uint8_t* from, int64_t stride) {
         asm volatile("tileloaddt1 (%0,%1,1), %%tmm1" : : "r"(from), "r"(stride) : "memory");
       },
       0, 1},
  };
  constexpr size_t kRows = 3, kBytes = 12;
  std::vector<uint8_t> memory(4096);
  Rng rng(3);
  for (auto& x : memory) x = static_cast<uint8_t>(rng.uniform() * 256);
  const uint8_t* middle = memory.data() + 2048;
  for (size_t i = 0; i < std::size(forms); ++i) {
    const Form& form = forms[i];
    for (const int64_t stride : {16, -20}) {
      std::array<uint8_t, kRows * kBytes> out, expected;
      load_config(Config().tile(1, kRows, kBytes));
      form.load(middle, stride);
      store<1>(out.data(), kBytes);
      for (size_t row = 0; row < kRows; ++row) {
        const int64_t at = form.offset + static_cast<int64_t>(row) * stride * form.scale;
        std::memcpy(expected.data() + row * kBytes, middle + at, kBytes);
      }
      EXPECT_EQ(out, expected) << "form " << i << ", stride " << stride;
    }
  }
}
#undef ADDRESS

TEST_F(AmxInstructions, ConfigurationLiesAnywhere) {
  static const Config fixed = Config().tile(1, 1, 4);
  struct Middle {
    uint8_t before[192] = {};
    Config config = Config().tile(1, 1, 4);
  };
  const Middle middle;
  const auto works = [] {
    uint32_t x = 0x01020304, y = 0;
    load<1>(&x, 4);
    store<1>(&y, 4);
    release();
    return x == y;
  };
  load_config(fixed);
  EXPECT_TRUE(works());
  load_config(middle.config);
  EXPECT_TRUE(works());
  asm volatile("mov %0, %%r11\n\tldtilecfg 192(%%r11)" : : "r"(&middle) : "r11", "memory");
  EXPECT_TRUE(works());
}

// --- what faults on a CPU with AMX; only the emulator can name it ---

class AmxFaultsDeathTest : public testing::Test {
 protected:
  void SetUp() override {
    if (!amx_emulator::install()) GTEST_SKIP() << "no emulation here";
  }
};

Config square() { return Config().tile(0, 16, 64).tile(1, 16, 64).tile(2, 16, 64); }

TEST_F(AmxFaultsDeathTest, Configurations) {
  const std::pair<Config, const char*> wrong[] = {
      {square().byte(0, 2), "ldtilecfg: palette 2 does not exist"},
      {square().byte(1, 3), "ldtilecfg: start_row is 3"},
      {square().byte(15, 1), "ldtilecfg: reserved byte 15 is 1"},
      {square().byte(32, 64), "ldtilecfg: reserved byte 32 is 64"},
      {square().byte(63, 9), "ldtilecfg: reserved byte 63 is 9"},
      {square().tile(7, 17, 64), "ldtilecfg: tile 7 cannot have 17 rows of 64 bytes"},
      {square().tile(4, 1, 260), "ldtilecfg: tile 4 cannot have 1 rows of 260 bytes"},
      {square().tile(5, 0, 4), "ldtilecfg: tile 5 cannot have 0 rows of 4 bytes"},
      {square().tile(6, 4, 0), "ldtilecfg: tile 6 cannot have 4 rows of 0 bytes"},
  };
  for (const auto& [config, message] : wrong) {
    EXPECT_DEATH(load_config(config), std::string("amx_emulator: ") + message);
  }
}

TEST_F(AmxFaultsDeathTest, TilesWithoutConfiguration) {
  alignas(64) static uint8_t memory[1024];
  EXPECT_DEATH(load<0>(memory, 64), "tileloadd: tiles are not configured on this thread");
  EXPECT_DEATH(store<0>(memory, 64), "tilestored: tiles are not configured on this thread");
  EXPECT_DEATH(zero<0>(), "tilezero: tiles are not configured on this thread");
  EXPECT_DEATH((multiply<0, 1, 2>()), "tdpbf16ps: tiles are not configured on this thread");
  load_config(square());
  EXPECT_EQ(amx_emulator::configured_threads(), 1);
  EXPECT_DEATH(load<3>(memory, 64), "tileloadd: tile 3 is not configured");
  EXPECT_DEATH((multiply<0, 1, 5>()), "tdpbf16ps: tile 5 is not configured");
  EXPECT_DEATH(std::thread([] { load<0>(memory, 64); }).join(), "not configured on this thread");
  EXPECT_DEATH((load_config(Config().byte(0, 0)), zero<0>()), "not configured on this thread");
  EXPECT_DEATH((load_config(Config().tile(0, 2, 6)), load<0>(memory, 64)),
               "tileloadd: tile 0 has rows of 6 bytes, no multiple of 4");
  release();
  EXPECT_EQ(amx_emulator::configured_threads(), 0);
  EXPECT_DEATH(zero<0>(), "tilezero: tiles are not configured on this thread");
}

TEST_F(AmxFaultsDeathTest, ProductsOfWrongTiles) {
  const auto product = [](const Config& config) {
    load_config(config);
    multiply<0, 1, 2>();
  };
  EXPECT_DEATH(product(square().tile(0, 15, 64)), "tdpbf16ps: 15 x 64 bytes cannot be 16 x 64");
  EXPECT_DEATH(product(square().tile(0, 16, 60)), "tdpbf16ps: 16 x 60 bytes cannot be 16 x 64");
  EXPECT_DEATH(product(square().tile(1, 16, 60)), "cannot be 16 x 60 by 16 x 64");
  EXPECT_DEATH(product(square().tile(2, 15, 64)), "cannot be 16 x 64 by 15 x 64");
  load_config(square());
  // What no assembler writes: a product of equal tiles, tilezero of tile 8, a product by tile 9.
  EXPECT_DEATH(asm volatile(".byte 0xc4, 0xe2, 0x72, 0x5c, 0xc0"),
               "tdpbf16ps: tiles 0, 0 and 1 are not different");
  EXPECT_DEATH(asm volatile(".byte 0xc4, 0xe2, 0x7a, 0x5c, 0xc1"),
               "tdpbf16ps: tiles 0, 1 and 0 are not different");
  EXPECT_DEATH(asm volatile(".byte 0xc4, 0xe2, 0x72, 0x5c, 0xc1"),
               "tdpbf16ps: tiles 0, 1 and 1 are not different");
  EXPECT_DEATH(asm volatile(".byte 0xc4, 0x62, 0x7b, 0x49, 0xc0"), "tilezero: there is no tile 8");
  EXPECT_DEATH(asm volatile(".byte 0xc4, 0xe2, 0x32, 0x5c, 0xc1"), "tdpbf16ps: there is no tile 9");
  release();
}

// The rest of what is illegal ends the program as ever, instructions beside the known ones too.
TEST_F(AmxFaultsDeathTest, OtherInstructionsAreNotSkipped) {
  const testing::KilledBySignal killed(SIGILL);
  load_config(square());
  EXPECT_EXIT(asm volatile("ud2"), killed, "");
  EXPECT_EXIT(asm volatile("tdpbssd %tmm0, %tmm1, %tmm2"), killed, "");
  EXPECT_EXIT(asm volatile(".byte 0xc4, 0xe2, 0x73, 0x49, 0xc0"), killed, "");  // tilezero, vvvv
  EXPECT_EXIT(asm volatile(".byte 0xc4, 0xe2, 0xfb, 0x49, 0xc0"), killed, "");  // tilezero, W
  EXPECT_EXIT(asm volatile(".byte 0xc4, 0xe2, 0x7f, 0x49, 0xc0"), killed, "");  // tilezero, L
  EXPECT_EXIT(asm volatile(".byte 0xc4, 0xe2, 0x7b, 0x49, 0xc1"), killed, "");  // tilezero, rm
  EXPECT_EXIT(asm volatile(".byte 0xc4, 0xe2, 0x7b, 0x4b, 0x07"), killed, "");  // load without SIB
  release();
}

TEST(AmxEmulatorDeathTest, FormerHandlersGetTheirSignals) {
  // A fresh process, in which nothing has installed the emulator yet.
  testing::FLAGS_gtest_death_test_style = "threadsafe";
  EXPECT_EXIT(
      {
        signal(SIGILL, [](int) { _exit(7); });
        if (!amx_emulator::install()) _exit(7);
        asm volatile("ud2");
      },
      testing::ExitedWithCode(7), "");
  EXPECT_EXIT(
      {
        struct sigaction action = {};
        action.sa_flags = SA_SIGINFO;
        action.sa_sigaction = [](int, siginfo_t* info, void*) {
          _exit(info->si_addr != nullptr ? 8 : 9);
        };
        sigaction(SIGILL, &action, nullptr);
        if (!amx_emulator::install()) _exit(8);
        asm volatile("ud2");
      },
      testing::ExitedWithCode(8), "");
}

}  // namespace
}  // namespace gdn
#endif
