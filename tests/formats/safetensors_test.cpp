// SPDX-License-Identifier: Apache-2.0
#include "gdn/model/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "gdn/base/check.h"

namespace gdn {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;
using ::testing::ThrowsMessage;
namespace fs = std::filesystem;

std::string file_of(const std::string& header, size_t data_size) {
  const uint64_t length = header.size();
  std::string bytes(8, '\0');
  std::memcpy(bytes.data(), &length, 8);
  return bytes + header + std::string(data_size, '\1');
}

// Parsing must end in one line that starts with the operation and holds `what`.
void expect_rejected(const std::string& bytes, const std::string& what) {
  EXPECT_THAT([&] { parse_safetensors(bytes, "f"); },
              ThrowsMessage<Error>(
                  AllOf(StartsWith("[safetensors] f: "), HasSubstr(what), Not(HasSubstr("\n")))))
      << what;
}

void expect_header_rejected(const std::string& header, size_t data_size, const std::string& what) {
  expect_rejected(file_of(header, data_size), what);
}

TEST(Safetensors, AcceptsAWellFormedFile) {
  const std::string bytes = file_of(
      R"({"__metadata__":{"format":"pt"},"b":{"dtype":"BF16","shape":[2,3],"data_offsets":[8,20]},)"
      R"("a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"e":{"dtype":"F32","shape":[0,7],"data_offsets":[8,8]},)"
      R"("s":{"dtype":"I64","shape":[],"data_offsets":[20,28]}}  )",
      28);
  const SafetensorsHeader header = parse_safetensors(bytes, "f");
  ASSERT_EQ(header.tensors.size(), 4u);
  EXPECT_EQ(header.tensors[0].name, "a");
  EXPECT_EQ(header.tensors[1].name, "e");
  EXPECT_EQ(header.tensors[2].name, "b");
  EXPECT_EQ(header.tensors[2].dtype, FileDType::kBF16);
  EXPECT_EQ(header.tensors[2].shape, (std::vector<int64_t>{2, 3}));
  EXPECT_EQ(header.tensors[2].bytes, 12u);
  EXPECT_EQ(reinterpret_cast<const char*>(header.tensors[2].data),
            bytes.data() + bytes.size() - 20);
  EXPECT_EQ(header.metadata.at("format"), "pt");
  EXPECT_TRUE(parse_safetensors(file_of("{}", 0), "f").tensors.empty());
}

TEST(Safetensors, RejectsBrokenFrames) {
  expect_rejected("", "too short");
  expect_rejected("1234567", "too short");
  expect_rejected(std::string(8, '\0'), "not a JSON object");
  expect_rejected(std::string(8, '\xff') + "{}", "does not fit");
  std::string huge = file_of("{}", 0);
  huge[0] = 3;  // one byte longer than the file
  expect_rejected(huge, "does not fit");
  expect_header_rejected(" {}", 0, "not a JSON object");
  expect_header_rejected("[]", 0, "not a JSON object");
  expect_header_rejected("{\"a\":", 0, "not valid JSON");
  expect_header_rejected("{} x", 0, "not valid JSON");
  expect_header_rejected("{\"a\xff\":1}", 0, "not valid JSON");
  expect_header_rejected("{}", 1, "1 bytes after the last tensor");
  expect_header_rejected("{\"a\":" + std::string(100000, '['), 0, "nested too deeply");
}

TEST(Safetensors, TruncatedAnywhereIsRejected) {
  const std::string whole =
      file_of(R"({"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}})", 16);
  for (size_t size = 0; size < whole.size(); ++size) {
    EXPECT_THROW(parse_safetensors(std::string_view(whole).substr(0, size), "f"), Error) << size;
  }
}

TEST(Safetensors, RejectsWrongEntries) {
  const auto entry = [](const std::string& dtype, const std::string& shape,
                        const std::string& offsets) {
    return "{\"a\":{\"dtype\":" + dtype + ",\"shape\":" + shape + ",\"data_offsets\":" + offsets +
           "}}";
  };
  expect_header_rejected(entry("\"F8_E4M3\"", "[1]", "[0,1]"), 1, "unknown dtype \"F8_E4M3\"");
  expect_header_rejected(entry("7", "[1]", "[0,1]"), 1, "unknown dtype 7");
  expect_header_rejected(entry("\"U8\"", "[-1]", "[0,1]"), 1, "non-negative integers, got -1");
  expect_header_rejected(entry("\"U8\"", "[1.0]", "[0,1]"), 1, "non-negative integers, got 1.0");
  expect_header_rejected(entry("\"U8\"", "[NaN]", "[0,1]"), 1, "not valid JSON");
  expect_header_rejected(entry("\"U8\"", "[1e400]", "[0,1]"), 1, "not valid JSON");
  expect_header_rejected(entry("\"U8\"", "[null]", "[0,1]"), 1, "non-negative integers, got null");
  expect_header_rejected(entry("\"U8\"", "\"1\"", "[0,1]"), 1, "shape must be a list");
  expect_header_rejected(entry("\"F64\"", "[4294967296,4294967296]", "[0,1]"), 1, "overflows");
  expect_header_rejected(entry("\"U8\"", "[18446744073709551615]", "[0,1]"), 1, "overflows");
  expect_header_rejected(entry("\"U8\"", "[1]", "[0]"), 1, "[begin, end]");
  expect_header_rejected(entry("\"U8\"", "[1]", "[1,0]"), 1, "outside");
  expect_header_rejected(entry("\"U8\"", "[2]", "[0,2]"), 1, "outside the 1 bytes");
  expect_header_rejected(entry("\"U8\"", "[1]", "[18446744073709551615,18446744073709551615]"), 1,
                         "outside");
  expect_header_rejected(entry("\"F32\"", "[1]", "[0,2]"), 2, "needs 4 bytes, data_offsets give 2");
  expect_header_rejected(R"({"a":{"shape":[1],"data_offsets":[0,1]}})", 1, "has no dtype");
  expect_header_rejected(R"({"a":{"dtype":"U8","data_offsets":[0,1]}})", 1, "has no shape");
  expect_header_rejected(R"({"a":{"dtype":"U8","shape":[1]}})", 1, "has no data_offsets");
  expect_header_rejected(R"({"a":3})", 1, "has no dtype");
  expect_header_rejected(R"({"__metadata__":{"x":1}})", 0, "object of strings");
  expect_header_rejected(R"({"__metadata__":[]})", 0, "object of strings");
}

TEST(Safetensors, RejectsOverlapsGapsAndDuplicates) {
  const auto two = [](const char* first, const char* a, const char* second, const char* b) {
    return std::string("{\"") + first + R"(":{"dtype":"U8","shape":[4],"data_offsets":)" + a +
           "},\"" + second + R"(":{"dtype":"U8","shape":[4],"data_offsets":)" + b + "}}";
  };
  EXPECT_EQ(parse_safetensors(file_of(two("x", "[4,8]", "y", "[0,4]"), 8), "f").tensors[0].name,
            "y");
  expect_header_rejected(two("x", "[0,4]", "y", "[2,6]"), 6, "\"x\" and \"y\" overlap");
  expect_header_rejected(two("x", "[0,4]", "y", "[0,4]"), 4, "overlap");
  expect_header_rejected(two("x", "[0,4]", "y", "[5,9]"), 9, "unused bytes before tensor \"y\"");
  expect_header_rejected(two("x", "[0,4]", "x", "[4,8]"), 8, "\"x\" occurs twice");
  expect_header_rejected(R"({"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}})", 1,
                         "\"dtype\" occurs twice");
}

class SafetensorsFiles : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "gdn_safetensors_XXXXXX").string();
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    folder_ = pattern;
  }
  void TearDown() override { fs::remove_all(folder_); }

  template <typename T>
  static FileTensor tensor(std::string name, FileDType dtype, std::vector<int64_t> shape,
                           const std::vector<T>& data) {
    return {std::move(name), dtype, std::move(shape),
            reinterpret_cast<const std::byte*>(data.data()), data.size() * sizeof(T)};
  }
  std::string folder_;
};

TEST_F(SafetensorsFiles, RoundTripIsAligned) {
  const std::vector<float> f = {1, 2, 3, 4, 5, 6};
  const std::vector<uint8_t> u = {7, 8, 9};
  const std::vector<double> d = {0.5};
  const std::string path = folder_ + "/model.safetensors";
  write_safetensors(
      path,
      {tensor("a.u", FileDType::kU8, {3}, u), tensor("b.f", FileDType::kF32, {2, 3}, f),
       tensor("c.d", FileDType::kF64, {}, d)},
      {{"step", "7"}});
  const std::string bytes = read_text_file(path);
  uint64_t length = 0;
  std::memcpy(&length, bytes.data(), 8);
  EXPECT_EQ(length % 8, 0u);
  const auto header = nlohmann::json::parse(bytes.substr(8, length));
  EXPECT_EQ(header["__metadata__"]["format"], "pt");
  EXPECT_EQ(header["c.d"]["data_offsets"], (std::vector<int>{0, 8}));
  EXPECT_EQ(header["b.f"]["data_offsets"], (std::vector<int>{8, 32}));
  EXPECT_EQ(header["a.u"]["data_offsets"], (std::vector<int>{32, 35}));

  const SafetensorsReader reader(folder_);
  EXPECT_EQ(reader.metadata().at("step"), "7");
  ASSERT_EQ(reader.tensors().size(), 3u);
  const FileTensor* b = reader.find("b.f");
  ASSERT_NE(b, nullptr);
  EXPECT_EQ(b->shape, (std::vector<int64_t>{2, 3}));
  EXPECT_EQ(std::memcmp(b->data, f.data(), b->bytes), 0);
  EXPECT_EQ(reader.find("b"), nullptr);
}

TEST_F(SafetensorsFiles, WritingChecksItsInput) {
  const std::vector<float> f = {1, 2};
  EXPECT_THROW(write_safetensors(folder_ + "/x", {tensor("a", FileDType::kF32, {3}, f)}), Error);
  EXPECT_THROW(write_safetensors(folder_ + "/x", {tensor("a", FileDType::kF32, {2}, f),
                                                  tensor("a", FileDType::kF32, {2}, f)}),
               Error);
  EXPECT_TRUE(fs::is_empty(folder_));
}

TEST_F(SafetensorsFiles, ReadsShardsThroughTheIndex) {
  const std::vector<float> f = {1, 2};
  const std::vector<float> g = {3, 4};
  write_safetensors(folder_ + "/one.safetensors", {tensor("a", FileDType::kF32, {2}, f)});
  write_safetensors(folder_ + "/two.safetensors",
                    {tensor("b", FileDType::kF32, {2}, g), tensor("a", FileDType::kF32, {2}, g)});
  const std::string index = folder_ + "/model.safetensors.index.json";
  const auto expect_error = [&](const std::string& text, const std::string& what) {
    atomic_write_file(index, text);
    EXPECT_THAT([&] { SafetensorsReader reader(folder_); }, ThrowsMessage<Error>(HasSubstr(what)));
  };
  atomic_write_file(index, R"({"weight_map":{"a":"one.safetensors","b":"two.safetensors"}})");
  const SafetensorsReader reader(folder_);
  ASSERT_EQ(reader.tensors().size(), 2u);
  float value = 0;
  std::memcpy(&value, reader.find("a")->data, sizeof value);
  EXPECT_EQ(value, 1.0f);  // the one the index names
  expect_error(R"({"weight_map":{"c":"one.safetensors"}})",
               "tensor \"c\" is not in one.safetensors");
  expect_error(R"({"weight_map":{"a":"../one.safetensors"}})", "is not a file name in this folder");
  expect_error(R"({"weight_map":{"a":"three.safetensors"}})", "three.safetensors: No such file");
  expect_error(R"({"weight_map":{"a":3}})", "has no file name");
  expect_error(R"({"weight_map":{"a":"one.safetensors","a":"two.safetensors"}})", "occurs twice");
  expect_error("{}", "no \"weight_map\"");
  expect_error("{", "not valid JSON");
  fs::remove(index);
  EXPECT_THAT([&] { SafetensorsReader reader(folder_); },
              ThrowsMessage<Error>(HasSubstr("holds neither")));
}

}  // namespace
}  // namespace gdn
