// Memory of large activations, kept for the next one when a tensor goes.
//
// A fresh piece costs more than the kernel that fills it: the system hands out pages one fault at a time and zeroes
// them, which takes several times as long as writing them (benchmarks/NOTES.md), and malloc gives pieces of this size
// back at once. A network's activations have the same few sizes step after step, so the pieces of one step serve the
// next.
//
// What is kept is for speed alone, so it goes back to the system
//   - when the system has no memory for a new piece, a workspace or another tensor of this library;
//   - before pieces in use and idle ones together are more than kMostKept times what was ever in use at once;
//   - at the next call, when nobody took it for a while;
//   - in the child of a fork, which may never use it;
//   - by release_idle_memory().
// Pages of large idle pieces are marked, and the system takes them back by itself when it is short of memory. That does
// not help against a limit on the address space (RLIMIT_AS), which counts them nevertheless: there somebody else's
// allocation can fail because of idle pieces.
#pragma once

#include <stddef.h>

namespace mx::cpu {

// From this size on; malloc keeps smaller pieces itself.
constexpr size_t kSmallestKept = size_t(1) << 20;

// Memory of at least `bytes` bytes on a cache line, contents undefined; null if there is none.
void* take_memory(size_t bytes);
void return_memory(void* piece);

// Gives all pieces that nobody uses back to the system.
void release_idle_memory();

}  // namespace mx::cpu
