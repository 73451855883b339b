// SPDX-License-Identifier: Apache-2.0
#include "gdn/base/file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <charconv>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <tuple>
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

// The folder without symbolic links, or nothing where it does not exist.
std::string real_folder(const std::string& folder) {
  const std::unique_ptr<char, decltype(&std::free)> real(::realpath(folder.c_str(), nullptr),
                                                         &std::free);
  return real ? real.get() : "";
}

// What the name of a file to write stands for.
struct Target {
  enum class Kind {
    kReplaced,   // a regular file, or none yet: `path` is replaced or made
    kOpened,     // a device, a FIFO, or a file that another process has open: `path` is opened
    kDescriptor  // a file that this process has open, as /dev/stdout is
  };
  Kind kind = Kind::kReplaced;
  std::string path;
  int descriptor = -1;
};

// Follows symbolic links by hand: the links of /proc lead to open files, which may have no name
// (any more), and whose position what is written must go on from.
Target find_target(const std::string& path) {
  GDN_CHECK(!path.empty(), "[write] the name of the file is empty");
  std::string current = path;
  for (int hops = 0; hops < 40; ++hops) {
    GDN_CHECK(current.back() != '/', "[write] ", path, " is a folder, not a file");
    struct stat info {};
    if (::lstat(current.c_str(), &info) != 0) {
      if (errno == ENOENT) return {Target::Kind::kReplaced, current, -1};
      throw Error(str_cat("[write] cannot write ", path, ": ", cause(errno)));
    }
    GDN_CHECK(!S_ISDIR(info.st_mode), "[write] ", path, " is a folder, not a file");
    GDN_CHECK(!S_ISSOCK(info.st_mode), "[write] ", path, " is a socket, not a file");
    if (S_ISREG(info.st_mode)) return {Target::Kind::kReplaced, current, -1};
    if (!S_ISLNK(info.st_mode)) return {Target::Kind::kOpened, current, -1};
    const std::string folder = real_folder(folder_of(current));
    const std::string name = current.substr(current.rfind('/') + 1);
    if (folder == str_cat("/proc/", ::getpid(), "/fd")) {
      Target target{Target::Kind::kDescriptor, current, -1};
      std::from_chars(name.data(), name.data() + name.size(), target.descriptor);
      return target;
    }
    if (folder.starts_with("/proc/") && folder.ends_with("/fd"))
      return {Target::Kind::kOpened, current, -1};
    std::string link(4096, '\0');
    const ssize_t size = ::readlink(current.c_str(), link.data(), link.size());
    GDN_CHECK(size > 0, "[write] cannot write ", path, ": ", cause(errno));
    link.resize(static_cast<size_t>(size));
    current = link.front() == '/' ? link : str_cat(folder, "/", link);
  }
  throw Error(str_cat("[write] cannot write ", path, ": ", cause(ELOOP)));
}

// Makes the file that is to become `target`, which `path` stands for: with the permissions of the
// file that is there, if one is.
std::pair<int, std::string> open_temporary(const std::string& path, const std::string& target) {
  static std::atomic<unsigned> counter{0};
  constexpr size_t kLongest = 200;  // of a name, which gets longer
  const size_t start = target.rfind('/') + 1;
  const std::string begin = target.substr(0, start + std::min(kLongest, target.size() - start));
  std::string name;
  int fd = -1;
  // A process of this number that was killed may have left some behind.
  for (int attempt = 0; attempt < 1000 && fd < 0 && (attempt == 0 || errno == EEXIST); ++attempt) {
    name = str_cat(begin, ".tmp-", ::getpid(), "-", counter++);
    fd = open_retrying(name.c_str(), O_WRONLY | O_CREAT | O_EXCL, 0666);
  }
  if (fd < 0) {
    const int error = errno;
    const std::string folder = folder_of(target);
    GDN_CHECK(error != ENOENT || ::access(folder.c_str(), F_OK) == 0, "[write] cannot write ", path,
              ": the folder ", folder, " does not exist");
    throw Error(str_cat("[write] cannot write ", path, ": no file can be made in the folder ",
                        folder, ": ", cause(error)));
  }
  struct stat info {};
  // Some file systems have no permissions to set.
  if (::stat(target.c_str(), &info) == 0) std::ignore = ::fchmod(fd, info.st_mode & 07777);
  return {fd, std::move(name)};
}

// Opens what is not replaced.
int open_target(const std::string& path, const Target& target) {
  const int fd = target.kind == Target::Kind::kDescriptor
                     ? ::fcntl(target.descriptor, F_DUPFD_CLOEXEC, 0)
                     : open_retrying(target.path.c_str(), O_WRONLY | O_NOCTTY);
  GDN_CHECK(fd >= 0, "[write] cannot open ", path, ": ", cause(errno));
  return fd;
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
  const Target target = find_target(path);
  if (target.kind != Target::Kind::kReplaced) {
    Descriptor fd(open_target(path, target));
    FileWriter writer(fd.get(), path);
    fill(writer);
    writer.flush();
    // What has nothing to sync, such as a pipe, says EINVAL.
    GDN_CHECK(::fsync(fd.get()) == 0 || errno == EINVAL || errno == EROFS || errno == ENOTSUP,
              "[write] ", path, ": ", cause(errno));
    GDN_CHECK(::close(fd.release()) == 0, "[write] ", path, ": ", cause(errno));
    return;
  }
  const auto [opened, temporary] = open_temporary(path, target.path);
  Descriptor fd(opened);
  try {
    FileWriter writer(fd.get(), path);
    fill(writer);
    writer.flush();
    GDN_CHECK(::fsync(fd.get()) == 0, "[write] ", path, ": ", cause(errno));
    GDN_CHECK(::close(fd.release()) == 0, "[write] ", path, ": ", cause(errno));
    GDN_CHECK(::rename(temporary.c_str(), target.path.c_str()) == 0, "[write] cannot rename ",
              temporary, " to ", target.path, ": ", cause(errno));
  } catch (...) {
    ::unlink(temporary.c_str());
    throw;
  }
  sync_folder(folder_of(target.path));
}

void check_writable(const std::string& path) {
  const Target target = find_target(path);
  switch (target.kind) {
    case Target::Kind::kReplaced: {
      const auto [opened, temporary] = open_temporary(path, target.path);
      const Descriptor fd(opened);
      ::unlink(temporary.c_str());
      return;
    }
    case Target::Kind::kOpened:  // not opened: that would wait for the reader of a FIFO
      GDN_CHECK(::faccessat(AT_FDCWD, target.path.c_str(), W_OK, AT_EACCESS) == 0,
                "[write] cannot open ", path, ": ", cause(errno));
      return;
    case Target::Kind::kDescriptor: {
      const int flags = ::fcntl(target.descriptor, F_GETFL);
      GDN_CHECK(flags >= 0 && (flags & O_ACCMODE) != O_RDONLY, "[write] cannot write ", path, ": ",
                cause(EBADF));
      return;
    }
  }
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
