// Shared libraries that are found at run time: which copy is taken, in what order, and how its symbols are read.
//
// 1. the path that the user gives (an environment variable), 2. the copy that this process has mapped already, torch's as
// a rule, 3. files that the caller knows of, the vendor's wheel, 4. the name that the system's loader knows.
// Two copies in one process have two states, so a stream or communicator of one is garbage to the other: they are refused.
#pragma once

#include <string>
#include <vector>

namespace hybridcomm::gpu {

struct Search {
  std::string name;                // for messages: "NCCL"
  std::string stem;                // of its files: "libnccl.so"
  std::string variable;            // the environment variable that names a file
  std::vector<std::string> files;  // those that are there are tried in turn
  std::string soname;              // "libnccl.so.2"
  std::string advice;              // what to do where there is none
};

// Files of a stem that this process has mapped, each once, however many names lead to it.
std::vector<std::string> mapped_copies(const std::string& stem);

// Stays open for good: unloading a driver, or a library that has threads, is not safe.
class SharedLibrary {
 public:
  // Raises Code::invalid: none is there (with every place that was tried and why it failed), or two copies would be.
  static SharedLibrary open(const Search& search);

  const std::string& path() const { return path_; }
  const std::string& how() const { return how_; }  // "HYBRIDCOMM_NCCL", "mapped already", "file", "system"
  void* find(const char* name) const;              // null: it has none

 private:
  SharedLibrary(void* handle, std::string path, std::string how)
      : handle_(handle), path_(std::move(path)), how_(std::move(how)) {}

  void* handle_;
  std::string path_, how_;
};

}  // namespace hybridcomm::gpu
