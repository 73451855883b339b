// SPDX-License-Identifier: Apache-2.0
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sched.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>

#include "gdn/base/file.h"
#include "gdn/base/parallel.h"
#include "gdn/bench/ceilings.h"
#include "gdn/bench/profile.h"
#include "gdn/bench/small_kernels.h"
#include "tests/cli/support.h"

namespace gdn {
namespace {

using cli_testing::call;
using cli_testing::Result;
using nlohmann::json;
using ::testing::HasSubstr;

class Bench : public ::testing::Test {
 protected:
  void SetUp() override {
    folder_ = std::filesystem::temp_directory_path() /
              ("gdn_bench_" + std::to_string(::getpid()) + "_" +
               ::testing::UnitTest::GetInstance()->current_test_info()->name());
    std::filesystem::create_directories(folder_);
    std::ofstream(config()) << "[model]\nhidden_size = 32\nnum_layers = 1\nintermediate_size = 32\n"
                               "[model.mixer]\nname = \"gated_delta_net\"\nnum_heads = 2\n"
                               "head_dim = 16\n[data]\nkind = \"stories\"\nseq_len = 16\n"
                               "batch_size = 2\n";
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  std::string config() const { return folder_ / "tiny.toml"; }
  std::string out() const { return folder_ / "out.json"; }

  // The rows of a run with --json.
  static json rows_of(const Result& result) {
    EXPECT_EQ(result.status, 0) << result.err;
    const json all = json::parse(result.out);
    EXPECT_FALSE(all.at("machine").at("cpu").get<std::string>().empty());
    EXPECT_FALSE(all.at("machine").at("simd").get<std::string>().empty());
    EXPECT_THAT(all.at("versions").at("gdn").get<std::string>(), HasSubstr("gdn"));
    for (const json& row : all.at("rows")) {
      EXPECT_GT(row.at("rate").get<double>(), 0) << row;
      EXPECT_GT(row.at("ms").get<double>(), 0) << row;
    }
    return all.at("rows");
  }

 private:
  std::filesystem::path folder_;
};

TEST_F(Bench, TrainTimesAStepOfAConfigurationAndItsParts) {
  const json rows = rows_of(call({"bench", "train", "--config", config(), "--seconds", "0.001",
                                  "--threads", "1", "--json", "--out", out()}));
  ASSERT_EQ(rows.size(), 2u);
  EXPECT_EQ(rows[0]["name"], "train step fp32");
  EXPECT_EQ(rows[1]["name"], "train step bf16");
  for (const json& row : rows) {
    // 2 x 16 tokens in `ms` milliseconds.
    EXPECT_NEAR(row["rate"].get<double>() * row["ms"].get<double>(), 32e3, 1);
    double sum = 0;
    for (const char* part : {"mixer op %", "GEMM %", "small kernels %", "optimizer %", "rest %"}) {
      EXPECT_GT(row.at(part).get<double>(), 0) << part;
      sum += row.at(part).get<double>();
    }
    EXPECT_NEAR(sum, 100, 0.1);
    EXPECT_GT(row.at("optimizer ms").get<double>(), 0);
    EXPECT_LT(row.at("optimizer ms").get<double>(), row.at("ms").get<double>());
    EXPECT_GT(row.at("of_ceiling").get<double>(), 0);
  }
  EXPECT_EQ(json::parse(read_text_file(out())).at("rows"), rows);
}

TEST_F(Bench, DecodeShowsTimeAndMemoryAlongALongContext) {
  const json rows =
      rows_of(call({"bench", "decode", "--config", config(), "--dtype", "fp32", "--tokens", "1200",
                    "--interval", "500", "--threads", "1", "--json"}));
  ASSERT_EQ(rows.size(), 4u);
  EXPECT_EQ(rows[0]["name"], "decode fp32 up to 500");
  EXPECT_EQ(rows[2]["name"], "decode fp32 up to 1200");
  EXPECT_EQ(rows[0]["state KiB"], rows[2]["state KiB"]);
  EXPECT_GT(rows[0]["process MiB"].get<double>(), 0);
}

TEST_F(Bench, DecodeTakesAnotherMixerWithTheOptionsItShares) {
  const Result result = call({"bench", "decode", "--config", config(), "--mixer", "titans_lmm",
                              "--dtype", "fp32", "--tokens", "20", "--threads", "1"});
  EXPECT_EQ(result.status, 0) << result.err;
  EXPECT_THAT(result.out, HasSubstr("with titans_lmm"));
  const auto state = [&](std::initializer_list<std::string> more) {
    std::vector<std::string> words = {"bench", "decode", "--dtype",   "fp32", "--tokens",
                                      "20",    "--json", "--threads", "1"};
    words.insert(words.end(), more);
    return rows_of(call(words))[0]["state KiB"].get<int64_t>();
  };
  // 4 layers of 4 heads: 64 x 64 numbers each and the inputs of convolutions; for the memory three
  // times 2 x 64 x 256.
  EXPECT_EQ(state({"--mixer", "gated_delta_net"}), state({}));
  EXPECT_GT(state({"--mixer", "titans_lmm"}), 4 * 4 * 3 * 2 * 64 * 256 * 4 / 1024);
  EXPECT_EQ(call({"bench", "decode", "--mixer", "no_such_mixer"}).status, 2);
}

TEST_F(Bench, OpsTakesAFilterAndComparesWithTorch) {
  const json rows = rows_of(call({"bench", "ops", "--filter", "SwiGLU bf16", "--seconds", "0.001",
                                  "--threads", "1", "--json"}));
  ASSERT_EQ(rows.size(), 2u);
  EXPECT_EQ(rows[0]["name"], "SwiGLU bf16 forward");
  EXPECT_EQ(rows[1]["name"], "SwiGLU bf16 backward");
  for (const json& row : rows) {
    EXPECT_GT(row["torch/ours"].get<double>(), 0);
    EXPECT_GT(row["of_ceiling"].get<double>(), 0);
    EXPECT_GT(row["of memory or multipliers"].get<double>(), 0);
    EXPECT_GT(row["of memory or own"].get<double>(), 0);
    EXPECT_GT(row["in L1 ms"].get<double>(), 0);
  }
  const Result none = call({"bench", "ops", "--filter", "no such row", "--threads", "1"});
  EXPECT_EQ(none.status, 2);
  EXPECT_THAT(none.err, HasSubstr("no such row"));
}

TEST_F(Bench, AFilterMayBeAWholeName) {
  const auto names = [&](const std::string& what, const std::string& filter) {
    std::vector<std::string> list;
    const Result result = call({"bench", what, "--filter", filter, "--hidden-size", "64",
                                "--seconds", "0.001", "--threads", "1", "--json"});
    EXPECT_EQ(result.status, 0) << result.err;
    const json all = json::parse(result.out);
    for (const json& row : all.at("rows")) {
      list.push_back(row["name"]);
      EXPECT_GT(row["rate"].get<double>(), 0) << row;
    }
    return list;
  };
  using ::testing::ElementsAre;
  EXPECT_THAT(names("ops", "SwiGLU bf16 backward"), ElementsAre("SwiGLU bf16 backward"));
  EXPECT_THAT(names("ops", "linear fp32 4096x256 to 768 forward"),
              ElementsAre("linear fp32 4096x256 to 768 forward"));
  EXPECT_THAT(names("mixers", "mamba2 decode"), ElementsAre("mamba2 decode B=1 after 8192 tokens"));
  EXPECT_THAT(names("ceilings", "exp, fp32"), ElementsAre("exp, fp32, in L1"));
}

TEST_F(Bench, MoreThreadsThanCpusAreNotPinnedAndSaySo) {
  const std::string many = std::to_string(allowed_cpus().size() + 1);
  const Result result =
      call({"bench", "ceilings", "--filter", "exp", "--threads", "1", many, "--json"});
  ASSERT_EQ(result.status, 0) << result.err;
  const json notes = json::parse(result.out).at("notes");
  ASSERT_EQ(notes.size(), 1u) << notes;
  EXPECT_THAT(notes[0].get<std::string>(), HasSubstr(many + " threads on"));
  cpu_set_t set;  // that of one thread before
  ASSERT_EQ(sched_getaffinity(0, sizeof(set), &set), 0);
  EXPECT_EQ(static_cast<size_t>(CPU_COUNT(&set)), allowed_cpus().size());
}

TEST_F(Bench, AFileThatCannotBeWrittenIsRefusedBeforeTheRun) {
  const std::string nowhere = out() + "/missing/out.json";
  const Result result = call({"bench", "ops", "--threads", "1", "--out", nowhere});
  EXPECT_NE(result.status, 0);
  EXPECT_EQ(result.out, "");
  EXPECT_THAT(result.err, HasSubstr(nowhere));
}

TEST_F(Bench, MixersRunsWhatTheFilterNames) {
  const Result result = call({"bench", "mixers", "--filter", "gated_delta_net", "--hidden-size",
                              "64", "--seconds", "0.001", "--threads", "1", "--json"});
  const json rows = rows_of(result);
  for (const json& note : json::parse(result.out).at("notes")) {
    EXPECT_FALSE(note.get<std::string>().starts_with("gated_delta_net,")) << note;
  }
  std::vector<std::string> names;
  for (const json& row : rows) {
    if (row["name"].get<std::string>().starts_with("gated_delta_net "))
      names.push_back(row["name"]);
  }
  EXPECT_THAT(names, ::testing::ElementsAre("gated_delta_net forward T=512",
                                            "gated_delta_net forward T=8192",
                                            "gated_delta_net forward T=16384",
                                            "gated_delta_net forward+backward T=512",
                                            "gated_delta_net forward+backward T=8192",
                                            "gated_delta_net decode B=1 after 8192 tokens"));
}

TEST_F(Bench, WrongUsageIsRefused) {
  EXPECT_EQ(call({"bench"}).status, 2);
  EXPECT_EQ(call({"bench", "everything"}).status, 2);
  EXPECT_EQ(call({"bench", "ops", "--threads", "0"}).status, 2);
  EXPECT_EQ(call({"bench", "train", "--config", "no such file"}).status, 2);
  EXPECT_EQ(call({"bench", "decode", "--interval", "-5"}).status, 2);
}

TEST(Ceilings, FollowTheHardware) {
  EXPECT_GT(bench::exp_grate(1), 0);
  EXPECT_GT(bench::small_gemm_gflops(1, 32, 32, 64, 1), 0);
  EXPECT_EQ(bench::amx_gflops(1).has_value(), bench::amx_gflops(2).has_value());
  const auto avx2 = bench::avx2_fma_gflops(1);
  EXPECT_GT(avx2.value_or(1), 0);
  bench::Ceilings ceilings(1);
  // By the rates of reading and of copying, which are measured once.
  const int64_t size = 1 << 16;
  const double bytes = 1e-9 * static_cast<double>(size);
  EXPECT_DOUBLE_EQ(ceilings.memory_seconds(size, 0),
                   bytes / ceilings.rate(bench::Access::kRead, size));
  EXPECT_DOUBLE_EQ(ceilings.memory_seconds(size, size),
                   2 * bytes / ceilings.rate(bench::Access::kCopy, 2 * size));
  EXPECT_DOUBLE_EQ(ceilings.memory_seconds(2 * size, size),
                   2 * bytes / ceilings.rate(bench::Access::kCopy, 3 * size) +
                       bytes / ceilings.rate(bench::Access::kRead, 3 * size));
  for (const auto& [name, rate] : bench::unit_rates(1)) EXPECT_GT(rate, 0) << name;
}

TEST(SmallKernelsInL1, RunForwardAndBackward) {
  using bench::SmallKernel;
  for (const SmallKernel kernel :
       {SmallKernel::kShortConv, SmallKernel::kRmsNorm, SmallKernel::kGatedNorm,
        SmallKernel::kL2Norm, SmallKernel::kSwiglu, SmallKernel::kGate,
        SmallKernel::kCrossEntropy}) {
    const bench::SmallKernelTimes times = bench::in_l1(kernel, DType::kBF16, 1);
    EXPECT_GT(times.forward, 0) << static_cast<int>(kernel);
    EXPECT_GT(times.backward, 0) << static_cast<int>(kernel);
  }
}

TEST(Profile, KnowsThePartsOfAStep) {
  using bench::Part;
  using bench::part_of;
  EXPECT_EQ(part_of("aten::mm"), Part::kGemm);
  EXPECT_EQ(part_of("mkldnn::_linear_pointwise"), Part::kGemm);
  EXPECT_EQ(part_of("gdn::delta_rule_bwd"), Part::kSequence);
  EXPECT_EQ(part_of("gdn::rms_norm_gated"), Part::kKernels);
  EXPECT_EQ(part_of("aten::_fused_adamw_"), Part::kOptimizer);
  EXPECT_EQ(part_of("aten::add"), Part::kRest);
}

}  // namespace
}  // namespace gdn
