#include "tag.h"

#include <iterator>

namespace hybridcomm {
namespace {

template <size_t N>
std::string name_of(const char* const (&names)[N], uint8_t code) {
  return code < N ? names[code] : "unknown(" + std::to_string(code) + ")";
}

// The order is the wire format's; lower.py holds the same lists and a test compares them.
const char* const kCollectives[] = {"allreduce",  "broadcast",        "all_gather", "reduce_scatter",
                                    "barrier",    "reduce",           "gather",     "scatter",
                                    "all_to_all", "monitored_barrier"};
const char* const kDtypes[] = {"float32",       "bfloat16",    "float16",   "int64",     "uint8",
                               "float64",       "int32",       "int8",      "int16",     "bool",
                               "float8_e4m3fn", "float8_e5m2", "complex64", "complex128"};
const char* const kOps[] = {"sum",     "mean", "none", "min",  "max",
                            "product", "band", "bor",  "bxor", "premul_sum"};
const char* const kCodecs[] = {"none",  "topk",  "fp16",  "bf16",  "fp8",      "int8",  "int4",
                               "sign1", "gtop1", "gtopk", "randk", "powersgd", "custom"};

}  // namespace

bool same_message(const Tag& seen, const Tag& expected) {
  return seen.digest == expected.digest && seen.step == expected.step && seen.nbytes == expected.nbytes &&
         seen.tensor == expected.tensor;
}

std::string describe(const Tag& tag) {
  std::string text = name_of(kCollectives, tag.collective) + "(" + name_of(kOps, tag.op);
  if (tag.codec != 0) text += ", " + name_of(kCodecs, tag.codec);
  return text + ") of " + std::to_string(tag.numel) + " " + name_of(kDtypes, tag.dtype);
}

std::string mismatch_text(int peer, const Tag& seen, const Tag& expected) {
  std::string text =
      "rank " + std::to_string(peer) + " runs " + describe(seen) + ", this rank " + describe(expected);
  if (seen.digest != expected.digest && describe(seen) == describe(expected)) {
    text += " with another root, compress setting or chunk size";
  }
  if (seen.digest == expected.digest && seen.tensor != expected.tensor) {
    return text +
           " of another name, or after other calls: all ranks must make the same calls, on the same buckets, "
           "in "
           "the same order";
  }
  if (seen.digest == expected.digest) {
    return text + ", at step " + std::to_string(seen.step) + " against " + std::to_string(expected.step) +
           " of the same plan: the engine is at fault, please report it";
  }
  return text +
         ": all ranks must call the same collectives in the same order, with the same shape, dtype, op and "
         "compress setting, on the same topology";
}

}  // namespace hybridcomm
