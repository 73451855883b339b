// SPDX-License-Identifier: Apache-2.0
#include "gdn/base/file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <utility>

#include "gdn/base/check.h"

namespace gdn {
namespace {

constexpr size_t kBufferSize = size_t{1} << 16;

std::string cause(int error) {
  std::string text = std::strerror(error);
  if (error == ENOSPC || error == EDQUOT)
    text += " (the disk is full: free some space and try again)";
  return text;
}

// A file descriptor that closes itself.
class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }
  int release() { return std::exchange(fd_, -1); }

 private:
  int fd_;
};

int open_retrying(const char* path, int flags, mode_t mode = 0) {
  int fd;
  do {
    fd = ::open(path, flags | O_CLOEXEC, mode);
  } while (fd < 0 && errno == EINTR);
  return fd;
}

std::string folder_of(const std::string& path) {
  const size_t slash = path.rfind('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

}  // namespace

FileWriter::FileWriter(int fd, std::string path) : fd_(fd), path_(std::move(path)) {
  buffer_.reserve(kBufferSize);
}

void FileWriter::write_through(const char* data, size_t size) {
  while (size > 0) {
    const ssize_t n = ::write(fd_, data, size);
    if (n < 0) {
      if (errno == EINTR) continue;
      throw Error(str_cat("[write] ", path_, ": ", cause(errno)));
    }
    data += n;
    size -= static_cast<size_t>(n);
  }
}

void FileWriter::write(const void* data, size_t size) {
  if (buffer_.size() + size > kBufferSize) flush();
  if (size > kBufferSize) {
    write_through(static_cast<const char*>(data), size);
  } else {
    buffer_.append(static_cast<const char*>(data), size);
  }
  position_ += static_cast<int64_t>(size);
}

void FileWriter::flush() {
  write_through(buffer_.data(), buffer_.size());
  buffer_.clear();
}

void sync_folder(const std::string& folder) {
  const Descriptor fd(open_retrying(folder.c_str(), O_RDONLY | O_DIRECTORY));
  GDN_CHECK(fd.get() >= 0, "[sync] cannot open the folder ", folder, ": ", cause(errno));
  // Some file systems cannot sync a folder and say EINVAL; their renames are as durable as they
  // get.
  GDN_CHECK(::fsync(fd.get()) == 0 || errno == EINVAL, "[sync] ", folder, ": ", cause(errno));
}

void atomic_write_file(const std::string& path, const std::function<void(FileWriter&)>& fill) {
  static std::atomic<unsigned> counter{0};
  const std::string temporary = str_cat(path, ".tmp-", ::getpid(), "-", counter++);
  Descriptor fd(open_retrying(temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL, 0666));
  GDN_CHECK(fd.get() >= 0, "[write] cannot create ", temporary, ": ", cause(errno));
  try {
    FileWriter writer(fd.get(), path);
    fill(writer);
    writer.flush();
    GDN_CHECK(::fsync(fd.get()) == 0, "[write] ", path, ": ", cause(errno));
    GDN_CHECK(::close(fd.release()) == 0, "[write] ", path, ": ", cause(errno));
    GDN_CHECK(::rename(temporary.c_str(), path.c_str()) == 0, "[write] cannot rename ", temporary,
              " to ", path, ": ", cause(errno));
  } catch (...) {
    ::unlink(temporary.c_str());
    throw;
  }
  sync_folder(folder_of(path));
}

void atomic_write_file(const std::string& path, std::string_view content) {
  atomic_write_file(path, [content](FileWriter& out) { out.write(content); });
}

MappedFile::MappedFile(const std::string& path) : path_(path) {
  const Descriptor fd(open_retrying(path.c_str(), O_RDONLY));
  GDN_CHECK(fd.get() >= 0, "[read] cannot open ", path, ": ", cause(errno));
  struct stat info {};
  GDN_CHECK(::fstat(fd.get(), &info) == 0, "[read] ", path, ": ", cause(errno));
  GDN_CHECK(S_ISREG(info.st_mode), "[read] ", path, " is not a regular file");
  size_ = static_cast<size_t>(info.st_size);
  if (size_ == 0) return;
  void* address = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, fd.get(), 0);
  GDN_CHECK(address != MAP_FAILED, "[read] cannot map ", path, ": ", cause(errno));
  data_ = static_cast<const std::byte*>(address);
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : path_(std::move(other.path_)),
      data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<std::byte*>(data_), size_);
}

std::string read_text_file(const std::string& path) {
  const Descriptor fd(open_retrying(path.c_str(), O_RDONLY));
  GDN_CHECK(fd.get() >= 0, "[read] cannot open ", path, ": ", cause(errno));
  struct stat info {};
  GDN_CHECK(::fstat(fd.get(), &info) == 0, "[read] ", path, ": ", cause(errno));
  GDN_CHECK(!S_ISDIR(info.st_mode), "[read] ", path, " is a folder, not a file");
  std::string text;
  text.reserve(static_cast<size_t>(info.st_size));
  char chunk[kBufferSize];
  for (;;) {
    const ssize_t n = ::read(fd.get(), chunk, sizeof chunk);
    if (n == 0) return text;
    if (n < 0) {
      if (errno == EINTR) continue;
      throw Error(str_cat("[read] ", path, ": ", cause(errno)));
    }
    text.append(chunk, static_cast<size_t>(n));
  }
}

}  // namespace gdn
