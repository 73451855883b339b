// SPDX-License-Identifier: Apache-2.0
// Files: reading, mapping, and writing so that a reader never sees half a file. Errors are one line
// with the path and the cause.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>

namespace gdn {

// The bytes of a file that atomic_write_file is making.
class FileWriter {
 public:
  FileWriter(int fd, std::string path);
  FileWriter(const FileWriter&) = delete;
  FileWriter& operator=(const FileWriter&) = delete;

  void write(const void* data, size_t size);  // throws gdn::Error, on a full disk with a hint
  void write(std::string_view text) { write(text.data(), text.size()); }
  int64_t position() const { return position_; }  // bytes written so far
  void flush();

 private:
  void write_through(const char* data, size_t size);

  int fd_;
  std::string path_;
  std::string buffer_;
  int64_t position_ = 0;
};

// Replaces `path` by what `fill` writes, or leaves it as it was: writes a temporary file in the
// same folder, syncs it, renames it over `path`, and syncs the folder. When anything fails, an
// exception of `fill` included, the temporary file is removed and `path` is untouched. A file that
// was there keeps its permissions. Where `path` is a symbolic link, that is done to the file it
// leads to. What is no regular file, such as a device, a FIFO or /dev/stdout, is opened and written
// to instead, as far as `fill` gets.
void atomic_write_file(const std::string& path, const std::function<void(FileWriter&)>& fill);
void atomic_write_file(const std::string& path, std::string_view content);

// Throws what atomic_write_file would throw before it calls `fill`: the folder does not exist or
// takes no file, `path` is a folder. To be asked before work whose result would be lost. Leaves
// nothing behind, and what exists untouched.
void check_writable(const std::string& path);

// A regular file mapped read-only, for as long as the object lives. An empty file has size 0 and a
// null data().
class MappedFile {
 public:
  MappedFile() = default;
  explicit MappedFile(const std::string& path);
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  ~MappedFile();

  const std::byte* data() const { return data_; }
  size_t size() const { return size_; }
  std::string_view text() const { return {reinterpret_cast<const char*>(data_), size_}; }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
  const std::byte* data_ = nullptr;
  size_t size_ = 0;
};

// All bytes of a file (or pipe).
std::string read_text_file(const std::string& path);

// Makes the entries of a folder durable, after files in it were made or renamed.
void sync_folder(const std::string& folder);

}  // namespace gdn
