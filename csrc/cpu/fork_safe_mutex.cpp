#include "fork_safe_mutex.h"

#include <pthread.h>

#include <new>

namespace mx::cpu {

ForkSafeMutex* ForkSafeMutex::newest_ = nullptr;

ForkSafeMutex::ForkSafeMutex() : older_(newest_) {
  if (newest_ == nullptr && pthread_atfork(lock_all, unlock_all, unlock_all) != 0) throw std::bad_alloc();
  newest_ = this;
}

void ForkSafeMutex::lock_all() {
  for (ForkSafeMutex* m = newest_; m != nullptr; m = m->older_) m->lock();
}

void ForkSafeMutex::unlock_all() {
  for (ForkSafeMutex* m = newest_; m != nullptr; m = m->older_) m->unlock();
}

}  // namespace mx::cpu
