// The codecs: one row each.
#include "kernels.h"

namespace hybridcomm::kernels {

extern const CodecRow kTopkRow, kFp16Row, kBf16Row, kFp8Row, kInt8Row, kInt4Row, kSign1Row;

const CodecRow* row_of(Codec codec) {
  switch (codec) {
    case Codec::topk:
      return &kTopkRow;
    case Codec::fp16:
      return &kFp16Row;
    case Codec::bf16:
      return &kBf16Row;
    case Codec::fp8:
      return &kFp8Row;
    case Codec::int8:
      return &kInt8Row;
    case Codec::int4:
      return &kInt4Row;
    case Codec::sign1:
      return &kSign1Row;
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
