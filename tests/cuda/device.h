/* What the tests on a GPU share: the words of their command lines, and calls that must succeed. */
#ifndef TEST_DEVICE_H
#define TEST_DEVICE_H

#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>

static bool small_run = false; /* fewer and smaller cases, for compute-sanitizer */

static inline void cuda_ok(cudaError_t e, int line) {
  if (e == cudaSuccess) return;
  fprintf(stderr, "line %d: %s\n", line, cudaGetErrorString(e));
  exit(2);
}
#define CUDA(call) cuda_ok(call, __LINE__)

#endif /* TEST_DEVICE_H */
