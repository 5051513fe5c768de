// Stands between one library and the system (LD_PRELOAD; tests/interposer.py), to make rare moments last.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

static uintptr_t begin, end;  // of the library's code
static unsigned hold_us;
static long clock_offset;
static int calls, calls_under_lock;  // of the system, for memory
static __thread int locks_held;
static long allocations, failing_from = LONG_MAX, failing_to;

static int (*real_lock)(pthread_mutex_t*);
static int (*real_unlock)(pthread_mutex_t*);
static int (*real_guard)(uint64_t*);
static int (*real_munmap)(void*, size_t);
static int (*real_madvise)(void*, size_t, int);
static void* (*real_mmap)(void*, size_t, int, int, int, off_t);
static void* (*real_aligned_alloc)(size_t, size_t);
static int (*real_posix_memalign)(void**, size_t, size_t);
static int (*real_clock)(clockid_t, struct timespec*);

__attribute__((constructor)) static void find(void) {
  real_lock = dlsym(RTLD_NEXT, "pthread_mutex_lock");
  real_unlock = dlsym(RTLD_NEXT, "pthread_mutex_unlock");
  real_munmap = dlsym(RTLD_NEXT, "munmap");
  real_madvise = dlsym(RTLD_NEXT, "madvise");
  real_mmap = dlsym(RTLD_NEXT, "mmap");
  real_aligned_alloc = dlsym(RTLD_NEXT, "aligned_alloc");
  real_posix_memalign = dlsym(RTLD_NEXT, "posix_memalign");
  real_clock = dlsym(RTLD_NEXT, "clock_gettime");
  real_guard = dlsym(RTLD_NEXT, "__cxa_guard_acquire");
}

void interposer_watch(uintptr_t library_begin, uintptr_t library_end) { begin = library_begin, end = library_end; }
void interposer_hold(unsigned microseconds) { hold_us = microseconds; }
void interposer_clock(long seconds) { clock_offset = seconds; }
int interposer_calls(void) { return calls; }
int interposer_calls_under_lock(void) { return calls_under_lock; }
long interposer_allocations(void) { return allocations; }

// From now on allocations first to last (from 0) find no memory. Counted are those of tensors and workspaces; what
// malloc gives is left alone, since PyTorch makes the message of its exception of it and does not check that it did.
void interposer_fail(long first, long last) { allocations = 0, failing_from = first, failing_to = last; }

static int fails(void) {
  const long n = __atomic_fetch_add(&allocations, 1, __ATOMIC_RELAXED);
  return n >= failing_from && n <= failing_to;
}

#define FROM_LIBRARY ((uintptr_t)__builtin_return_address(0) >= begin && (uintptr_t)__builtin_return_address(0) < end)

// The library's mutexes. It may unlock one by a jump, which leaves no address to return to in it.
static pthread_mutex_t* mutexes[16];

int pthread_mutex_lock(pthread_mutex_t* mutex) {
  const int result = real_lock(mutex);
  if (FROM_LIBRARY) {
    int i = 0;
    while (mutexes[i] && mutexes[i] != mutex) ++i;
    mutexes[i] = mutex;
    ++locks_held;
    if (hold_us) usleep(hold_us);
  }
  return result;
}

int pthread_mutex_unlock(pthread_mutex_t* mutex) {
  for (int i = 0; mutexes[i]; ++i)
    if (mutexes[i] == mutex) --locks_held;
  return real_unlock(mutex);
}

// Of a static variable inside of a function.
int __cxa_guard_acquire(uint64_t* guard) {
  const int result = real_guard(guard);
  if (result && FROM_LIBRARY && hold_us) usleep(hold_us);
  return result;
}

static void called(int from_library) {
  __atomic_add_fetch(&calls, from_library, __ATOMIC_RELAXED);
  __atomic_add_fetch(&calls_under_lock, from_library && locks_held, __ATOMIC_RELAXED);
}

int munmap(void* address, size_t size) {
  called(FROM_LIBRARY);
  return real_munmap(address, size);
}

int madvise(void* address, size_t size, int advice) {
  called(FROM_LIBRARY);
  return real_madvise(address, size, advice);
}

void* mmap(void* address, size_t size, int protection, int flags, int file, off_t offset) {
  called(FROM_LIBRARY);
  if (FROM_LIBRARY && fails()) return MAP_FAILED;
  return real_mmap(address, size, protection, flags, file, offset);
}

void* aligned_alloc(size_t alignment, size_t size) {
  return FROM_LIBRARY && fails() ? NULL : real_aligned_alloc(alignment, size);
}

// PyTorch's allocator, whoever calls it.
int posix_memalign(void** piece, size_t alignment, size_t size) {
  return fails() ? ENOMEM : real_posix_memalign(piece, alignment, size);
}

int clock_gettime(clockid_t clock, struct timespec* time) {
  const int result = real_clock(clock, time);
  if (clock == CLOCK_MONOTONIC) time->tv_sec += clock_offset;
  return result;
}
