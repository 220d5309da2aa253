#include "reports.h"

namespace sim {
namespace {

const char* name_of(Finding finding) {
  switch (finding) {
    case Finding::race:
      return "race";
    case Finding::bounds:
      return "bounds";
    case Finding::freed:
      return "freed";
    case Finding::stranger:
      return "stranger";
    case Finding::never_recorded:
      return "never recorded";
    case Finding::unordered:
      return "unordered";
    case Finding::deadlock:
      return "deadlock";
    case Finding::leak:
      return "leak";
    case Finding::mismatch:
      return "mismatch";
    case Finding::misuse:
      return "misuse";
    case Finding::kernel:
      return "kernel";
  }
  return "";
}

}  // namespace

void Reports::add(Finding finding, const std::string& text) {
  const std::string line = std::string(name_of(finding)) + ": " + text;
  ++found_;
  if (seen_.insert(line).second) lines_.push_back(line);
}

}  // namespace sim
