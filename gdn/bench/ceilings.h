// SPDX-License-Identifier: Apache-2.0
// What this machine can do at most: the yardsticks of all benchmarks. Torch-free. Each figure is
// the best of a few short runs of `threads` pinned threads together.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace gdn::bench {

// Pins the calling thread to the i-th of allowed_cpus(), or lets it run on all of them where there
// are fewer.
void pin_this_thread(int i);

// fp32 multiply-adds from registers in GFLOP/s, by the best SIMD target of this machine, and by
// AVX2 (nothing where the machine or the build lacks it).
double fma_gflops(int threads);
std::optional<double> avx2_fma_gflops(int threads);
// bf16 products with fp32 sums in GFLOP/s, by AVX512_BF16's vdpbf16ps and by AMX tiles; nothing
// where the CPU or the kernel lacks it.
std::optional<double> bf16_gflops(int threads);
std::optional<double> amx_gflops(int threads);

// What AVX-512's units take, by the names of the instructions: 1e9 of them per second, or 1e9
// groups where several are named. Empty where the CPU lacks AVX-512 or AVX512_BF16.
std::vector<std::pair<std::string, double>> unit_rates(int threads);

// C[m,n] += A[m,k] B[k,n] in fp32 over `batch` different operands per thread, by the micro-kernel
// of the chunk kernels: few operands stay in L1, more in L2.
double small_gemm_gflops(int threads, int64_t m, int64_t n, int64_t k, int64_t batch);

// exp() of fp32 out of and into L1, in 1e9 per second.
double exp_grate(int threads);

// GB/s over a working set of `bytes` in all, split over the threads: reading it; reading and
// writing it in place (both counted); reading one half and writing the other (both counted).
enum class Access : uint8_t { kRead, kReadModifyWrite, kCopy };
double bandwidth_gbs(int threads, Access access, int64_t bytes);

// bandwidth_gbs and the others, each measured once per process and then remembered.
class Ceilings {
 public:
  explicit Ceilings(int threads) : threads_(threads) {}
  double fma();
  // Of products in fp32 (fma()) or in bf16: AMX's, else AVX512_BF16's, else fp32's.
  double products(bool bf16);
  double exp();
  // The time in seconds that moving these bytes takes at least: reads that are written back in
  // place or beside, and reads or writes alone. The rates are those of a working set of all of
  // them.
  double memory_seconds(int64_t read_bytes, int64_t written_bytes);
  // The same for a decoding step, which reads its weights and updates its state in place.
  double step_seconds(int64_t weight_bytes, int64_t state_bytes);
  double rate(Access access, int64_t bytes);

 private:
  int threads_;
};

std::string cpu_name();  // "AMD EPYC 9R14"

}  // namespace gdn::bench
