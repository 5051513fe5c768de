// A mutex that is free in the child of a fork.
//
// A child has one thread, a copy of the one that forked. A plain mutex that another thread held at that moment stays
// locked in it for ever, and what the mutex guards may be half changed.
#pragma once

#include <mutex>

namespace mx::cpu {

// fork waits until the mutex is free. To be made when the library is loaded, and never destroyed. Whoever holds one
// must not wait for another, and should not call the system: all threads wait meanwhile, and so does fork.
class ForkSafeMutex {
 public:
  ForkSafeMutex();
  ForkSafeMutex(const ForkSafeMutex&) = delete;

  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  static void lock_all();
  static void unlock_all();

  static ForkSafeMutex* newest_;
  std::mutex mutex_;
  ForkSafeMutex* const older_;
};

}  // namespace mx::cpu
