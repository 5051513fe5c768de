#include "activation_memory.h"

#include <pthread.h>
#include <stdint.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <iterator>
#include <mutex>
#include <new>
#include <set>
#include <utility>

#include "fork_safe_mutex.h"

namespace mx::cpu {
namespace {

using Clock = std::chrono::steady_clock;

constexpr size_t kHugePage = size_t(2) << 20, kPage = size_t(64) << 10;  // of every system at most

// Calls of take_memory, and time, after which a piece that nobody took goes back to the system. A training step takes
// fewer than a hundred, and a longer step than this is rare.
constexpr uint64_t kKeptCalls = 512;
constexpr std::chrono::seconds kKeptTime(60);

// A step needs more pieces than it uses at once, for a piece serves only tensors of about its size.
constexpr size_t kMostKept = 2;

// Marking a small piece, page by page, takes longer than filling it.
constexpr size_t kMarked = size_t(16) << 20;

struct Piece {
  void* data;
  size_t size;
  uint64_t returned_at_call;
  Clock::time_point returned_at;
};

struct ByAddress {
  bool operator()(const Piece& a, const Piece& b) const { return a.data < b.data; }
};

struct BySize {
  bool operator()(const Piece& a, const Piece& b) const { return a.size < b.size; }
};

// A piece's node moves between the sets: to return one takes no memory.
using LentMemory = std::set<Piece, ByAddress>;
using IdleMemory = std::multiset<Piece, BySize>;  // among equal ones the one returned last is the last

// Must be called without the lock.
void unmap(const IdleMemory& pieces) {
  for (const Piece& piece : pieces) munmap(piece.data, piece.size);
}

// On a boundary of huge pages, which fault and are marked a few hundred times faster than small ones.
void* map(size_t size) {
  void* const data = mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) return nullptr;
  char* const begin = static_cast<char*>(data);
  char* const aligned = begin + (kHugePage - reinterpret_cast<uintptr_t>(begin) % kHugePage) % kHugePage;
  if (aligned > begin) munmap(begin, size_t(aligned - begin));
  munmap(aligned + size, size_t(begin + kHugePage - aligned));
  madvise(aligned, size, MADV_HUGEPAGE);
  return aligned;
}

class ActivationMemory {
 public:
  void* take(size_t bytes) {
    const size_t size = (bytes + kPage - 1) / kPage * kPage;
    IdleMemory dropped;
    void* data;
    {
      const std::lock_guard<ForkSafeMutex> lock(mutex_);
      ++calls_;
      drop_old(dropped);
      data = take_idle(size);
      if (data == nullptr) make_room(size, dropped);
    }
    unmap(dropped);
    return data != nullptr ? data : take_new(size);
  }

  void put(void* data) {
    LentMemory::node_type node;
    {
      const std::lock_guard<ForkSafeMutex> lock(mutex_);
      node = lent_.extract(lent_.find(Piece{data}));
    }
    Piece& piece = node.value();
    if (piece.size >= kMarked) madvise(data, piece.size, MADV_FREE);
    const std::lock_guard<ForkSafeMutex> lock(mutex_);
    piece.returned_at_call = calls_;
    piece.returned_at = Clock::now();
    lent_bytes_ -= piece.size;
    idle_bytes_ += piece.size;
    idle_.insert(std::move(node));
  }

  void release_idle() {
    IdleMemory dropped;
    {
      const std::lock_guard<ForkSafeMutex> lock(mutex_);
      dropped.swap(idle_);
      idle_bytes_ = 0;
    }
    unmap(dropped);
  }

 private:
  void* take_idle(size_t size) {
    // The smallest that is large enough, of these the one returned last, but none that would waste more than an eighth.
    const auto smallest = idle_.lower_bound(Piece{nullptr, size});
    if (smallest == idle_.end() || smallest->size > size + size / 8) return nullptr;
    auto node = idle_.extract(std::prev(idle_.upper_bound(*smallest)));
    void* const data = node.value().data;
    idle_bytes_ -= node.value().size;
    lend(std::move(node));
    return data;
  }

  void* take_new(size_t size) {
    LentMemory made;
    made.insert(Piece{nullptr, size});  // first, as it may throw
    auto node = made.extract(made.begin());
    void* data = map(size);
    if (data == nullptr) {
      release_idle();
      data = map(size);
    }
    if (data == nullptr) return nullptr;
    node.value().data = data;
    const std::lock_guard<ForkSafeMutex> lock(mutex_);
    lend(std::move(node));
    return data;
  }

  void lend(LentMemory::node_type node) {
    lent_bytes_ += node.value().size;
    most_lent_bytes_ = std::max(most_lent_bytes_, lent_bytes_);
    lent_.insert(std::move(node));
  }

  // For a new piece: the oldest idle ones go while there would be more than kMostKept allows.
  void make_room(size_t size, IdleMemory& dropped) {
    const size_t most = kMostKept * std::max(most_lent_bytes_, lent_bytes_ + size);
    while (!idle_.empty() && lent_bytes_ + idle_bytes_ + size > most)
      drop(std::min_element(idle_.begin(), idle_.end(),
                            [](const Piece& a, const Piece& b) { return a.returned_at < b.returned_at; }),
           dropped);
  }

  void drop_old(IdleMemory& dropped) {
    const Clock::time_point now = Clock::now();
    for (auto piece = idle_.begin(); piece != idle_.end();) {
      const bool old = calls_ - piece->returned_at_call > kKeptCalls || now - piece->returned_at > kKeptTime;
      piece = old ? drop(piece, dropped) : std::next(piece);
    }
  }

  IdleMemory::iterator drop(IdleMemory::iterator piece, IdleMemory& dropped) {
    const auto next = std::next(piece);
    idle_bytes_ -= piece->size;
    dropped.insert(idle_.extract(piece));
    return next;
  }

  ForkSafeMutex mutex_;
  uint64_t calls_ = 0;
  IdleMemory idle_;
  LentMemory lent_;
  size_t idle_bytes_ = 0, lent_bytes_ = 0, most_lent_bytes_ = 0;
};

// Made when the library is loaded, for the guard of a variable inside of a function is a lock that fork knows nothing
// of; never destroyed, for tensors may outlive the end of main.
ActivationMemory* const memory = [] {
  auto* const made = new ActivationMemory;
  if (pthread_atfork(nullptr, nullptr, release_idle_memory) != 0) throw std::bad_alloc();
  return made;
}();

}  // namespace

void* take_memory(size_t bytes) { return memory->take(bytes); }
void return_memory(void* piece) { memory->put(piece); }
void release_idle_memory() { memory->release_idle(); }

}  // namespace mx::cpu
