/* The other translation unit: see units_a.c. */
#ifdef RDKV_STATIC
#define RDKV_IMPLEMENTATION
#endif
#include "../rdkv.h"

#ifdef __cplusplus
extern "C"
#endif
    size_t
    bytes_in_b(const rdkv_config *cfg);

size_t bytes_in_b(const rdkv_config *cfg) { return rdkv_layer_bytes(cfg, 1000); }
