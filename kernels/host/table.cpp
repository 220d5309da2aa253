// The codecs: one row each.
#include "kernels.h"

namespace hybridcomm::kernels {

extern const CodecRow kTopkRow;

const CodecRow* row_of(Codec codec) {
  switch (codec) {
    case Codec::topk:
      return &kTopkRow;
    default:
      return nullptr;
  }
}

bool codec_valid(const CodecParams& params) {
  const CodecRow* row = row_of(params.codec);
  return row != nullptr && params.reserved == 0 && row->valid(params);
}

size_t codec_nbytes(const CodecParams& params, size_t numel) {
  return codec_valid(params) ? row_of(params.codec)->layout(params, numel).nbytes : 0;
}

bool codec_whole_region(const CodecParams& params) {
  const CodecRow* row = row_of(params.codec);
  return row != nullptr && row->whole_region;
}

}  // namespace hybridcomm::kernels
