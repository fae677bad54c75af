/* The library, compiled once for all tests. */
#define RDKV_IMPLEMENTATION
#include "../rdkv.h"
