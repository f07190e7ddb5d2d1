// What Python asks of the CUDA runtime. Status codes are those of cudaError_t; 0 is success.
#pragma once

#include <cstdint>

namespace fastcontrast::cuda {

// Makes `device` the current one of this library's copy of the runtime.
int use_device(int device);

// Whether this build has code that `device` and its driver can run.
int probe(int device);

const char* error_string(int status);

// Blocks among which a row of `count` entries is split, so that `rows` of them occupy the chip.
int64_t row_splits(int64_t rows, int64_t count, int dtype, int multiprocessors);

}  // namespace fastcontrast::cuda
