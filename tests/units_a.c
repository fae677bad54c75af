/* One of two translation units that use the library; the other is units_b.c. Built with
   RDKV_IMPLEMENTATION here alone, or, with RDKV_STATIC, with a private copy in both. */
#include <stdio.h>
#include <string.h>
#define RDKV_IMPLEMENTATION
#include "../rdkv.h"
#include "../rdkv.h" /* a second time does no harm */

#ifdef __cplusplus
extern "C"
#endif
    size_t
    bytes_in_b(const rdkv_config *cfg);

int main(void) {
  rdkv_config c;
  size_t a, b;
  memset(&c, 0, sizeof c);
  c.n_q_heads = 8, c.n_kv_heads = 2, c.k_dim = 64;
  if (rdkv_resolve(&c, &c) != RDKV_OK) return 1;
  a = rdkv_layer_bytes(&c, 1000), b = bytes_in_b(&c);
  printf("%lu bytes in both units\n", (unsigned long)a);
  return a == 0 || a != b;
}
