// What nccl.h needs of the CUDA toolkit, so that it can be read where there is none.
#pragma once
#include <stddef.h>

#define CUDART_VERSION 12000
#define __CUDA_BF16_TYPES_EXIST__ 1
typedef struct CUstream_st* cudaStream_t;
