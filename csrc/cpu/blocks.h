// Memory of large activations, kept for the next one when a tensor goes.
//
// A fresh block costs more than the kernel that fills it: the system hands out pages one fault at a time and zeroes
// them, which takes several times as long as writing them (benchmarks/NOTES.md), and malloc gives blocks of this size
// back at once. A network's activations have the same few sizes step after step, so the blocks of one step serve the
// next. Large ones are marked while they wait: the system takes their pages back when it is short of memory.
#pragma once

#include <stddef.h>

namespace mx::cpu {

// From this size on; malloc keeps smaller blocks itself.
constexpr size_t kSmallestBlock = size_t(1) << 20;

// Memory of at least `bytes` bytes on a cache line, contents undefined; null if there is none.
void* take_block(size_t bytes);
void return_block(void* block);

}  // namespace mx::cpu
