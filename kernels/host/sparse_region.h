// All sparse codecs for one instruction set, with its lanes V.
#pragma once

#include "gtop1.h"
#include "gtopk.h"
#include "powersgd.h"
#include "randk.h"
#include "sparse.h"

namespace hybridcomm::kernels {
namespace {

template <class V>
constexpr SparseKernels sparse_kernels() {
  return {{encode_gtop1<V>, decode_gtop1},
          {encode_gtopk<V>, decode_gtopk},
          {encode_randk<V>, decode_randk},
          {encode_powersgd<V>, decode_powersgd<V>}};
}

}  // namespace
}  // namespace hybridcomm::kernels
