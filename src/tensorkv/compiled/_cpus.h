/* A function that is compiled for several processors, of which the one that runs chooses when it loads. The bits do not
 * depend on it: each operation on an element is a single one of IEEE 754.
 */
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EACH_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EACH_CPU
#endif
