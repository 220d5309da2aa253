// What a part of a collective or message touches, and what moves when all parts have come.
#pragma once

#include <cstddef>
#include <utility>

#include "communicators.h"

namespace sim {

bool is_message(const Part& part);
// Bytes that a part reads and writes.
std::pair<size_t, size_t> touched(const Part& part);
void move(const Meeting& meeting);

}  // namespace sim
