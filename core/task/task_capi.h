// The task generators for other languages: plain C, no exceptions across the boundary. The training script
// builds this folder into a shared library (g++ -std=c++20 -O2 -shared -fPIC -I <repository> core/task/*.cpp)
// and loads it.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

int kvlapse_task_family_count(void);
// Name of family `index`, NULL outside the range; `sizes` (may be NULL) receives min, max and default size.
const char* kvlapse_task_family(int index, int sizes[3]);

// Writes prompt, completion and answer one after the other into `text` and their lengths in bytes into
// `lengths[3]`. Returns the total length; when that exceeds `capacity`, nothing is written to `text`. Returns
// -1 for an unknown family or a size out of range (size 0: default).
int64_t kvlapse_task_make(const char* family, uint64_t seed, int size, char* text, int64_t capacity,
                          int64_t lengths[3]);

#ifdef __cplusplus
}
#endif
