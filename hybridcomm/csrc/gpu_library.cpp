#include "gpu_library.h"

#include <dlfcn.h>
#include <sys/stat.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>

#include "common.h"

namespace hybridcomm::gpu {
namespace {

struct Mapped {
  std::string path;
  dev_t device;
  ino_t file;
};

bool begins_with(const std::string& text, const std::string& with) {
  return text.compare(0, with.size(), with) == 0;
}

std::string base_name(const std::string& path) { return path.substr(path.rfind('/') + 1); }

// From /proc/self/maps, as <link.h>, which has the loader's own list, would be found in this folder.
std::vector<Mapped> mapped(const std::string& stem) {
  std::ifstream maps("/proc/self/maps");
  std::vector<Mapped> copies;
  for (std::string line; std::getline(maps, line);) {
    const size_t begin = line.find('/');
    if (begin == std::string::npos) continue;
    const std::string path = line.substr(begin);
    if (!begins_with(base_name(path), stem)) continue;
    struct stat status{};
    if (::stat(path.c_str(), &status) != 0) status = {};  // its file is gone: a copy of its own
    const bool known = std::any_of(copies.begin(), copies.end(), [&](const Mapped& copy) {
      return copy.path == path ||
             (status.st_ino != 0 && copy.device == status.st_dev && copy.file == status.st_ino);
    });
    if (!known) copies.push_back({path, status.st_dev, status.st_ino});
  }
  return copies;
}

bool same_file(const std::string& path, const Mapped& copy) {
  struct stat status{};
  return ::stat(path.c_str(), &status) == 0 && status.st_dev == copy.device && status.st_ino == copy.file;
}

[[noreturn]] void refuse_two(const Search& search, const std::string& one, const std::string& other,
                             const std::string& advice) {
  throw Error(Code::invalid, search.name + ": two copies in one process, " + one + " and " + other +
                                 ", whose handles do not go together; " + advice);
}

// Opens a file, and where it cannot be, says why in `tried`.
void* try_to_open(const std::string& path, std::string& tried) {
  void* handle = ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    const char* why = ::dlerror();
    tried += (tried.empty() ? "" : "; ") + std::string(why == nullptr ? path : why);
  }
  return handle;
}

// Of what was opened last, by a name that need not be a path.
std::string path_of(const std::string& stem, const std::string& name) {
  if (name.find('/') != std::string::npos) return name;
  const std::vector<Mapped> copies = mapped(stem);
  return copies.empty() ? name : copies.back().path;
}

}  // namespace

std::vector<std::string> mapped_copies(const std::string& stem) {
  std::vector<std::string> paths;
  for (const Mapped& copy : mapped(stem)) paths.push_back(copy.path);
  return paths;
}

SharedLibrary SharedLibrary::open(const Search& search) {
  const std::vector<Mapped> copies = mapped(search.stem);
  if (copies.size() > 1) {
    refuse_two(search, copies[0].path, copies[1].path, "import only one package that brings it");
  }
  const char* given = std::getenv(search.variable.c_str());
  std::string tried;
  if (given != nullptr && *given != '\0') {
    if (!copies.empty() && !same_file(given, copies[0])) {
      refuse_two(search, copies[0].path, given, "unset " + search.variable + ", or name the first");
    }
    void* handle = try_to_open(given, tried);
    if (handle == nullptr) throw Error(Code::invalid, search.variable + "=" + given + ": " + tried);
    return {handle, given, search.variable};
  }
  if (!copies.empty()) {
    void* handle = ::dlopen(copies[0].path.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD);
    if (handle != nullptr) return {handle, copies[0].path, "mapped already"};
    throw Error(Code::invalid,
                search.name + ": " + copies[0].path + " is mapped, but cannot be opened again");
  }
  for (const std::string& file : search.files) {
    struct stat status{};
    if (::stat(file.c_str(), &status) != 0) continue;
    void* handle = try_to_open(file, tried);
    if (handle != nullptr) return {handle, file, "file"};
  }
  void* handle = try_to_open(search.soname, tried);
  if (handle != nullptr) return {handle, path_of(search.stem, search.soname), "system"};
  throw Error(Code::invalid, search.name + " is not there (" + tried + "): " + search.advice);
}

void* SharedLibrary::find(const char* name) const { return ::dlsym(handle_, name); }

}  // namespace hybridcomm::gpu
