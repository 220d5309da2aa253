#include "common.h"

#include <cerrno>
#include <cstring>

namespace hybridcomm {

std::string errno_text(const std::string& what) { return what + ": " + std::strerror(errno); }

std::string join_ranks(const std::vector<int>& ranks) {
  std::string text = ranks.size() == 1 ? "rank " : "ranks ";
  for (size_t i = 0; i < ranks.size(); ++i) text += (i ? ", " : "") + std::to_string(ranks[i]);
  return ranks.empty() ? "no rank" : text;
}

}  // namespace hybridcomm
