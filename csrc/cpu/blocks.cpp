#include "blocks.h"

#include <stdint.h>
#include <sys/mman.h>

#include <iterator>
#include <map>
#include <mutex>
#include <unordered_map>

namespace mx::cpu {
namespace {

constexpr size_t kHugePage = size_t(2) << 20, kPage = size_t(64) << 10;  // of every system at most
// Calls of take_block after which a block that nobody took goes back to the system. A training step takes fewer than
// a hundred.
constexpr uint64_t kKeptCalls = 512;

// Marking a small block, page by page, takes longer than filling it.
constexpr size_t kMarked = size_t(16) << 20;

struct FreeBlock {
  void* data;
  uint64_t returned_at;
};

class Blocks {
 public:
  void* take(size_t bytes) {
    const size_t size = (bytes + kPage - 1) / kPage * kPage;
    const std::lock_guard<std::mutex> lock(mutex_);
    ++calls_;
    drop_old();
    // The smallest that is large enough, of these the one returned last, but none that would waste more than an eighth.
    auto found = free_.lower_bound(size);
    if (found != free_.end() && found->first <= size + size / 8) {
      found = std::prev(free_.upper_bound(found->first));
      void* const data = found->second.data;
      sizes_[data] = found->first;
      free_.erase(found);
      return data;
    }
    void* const data = map(size);
    if (data != nullptr) sizes_[data] = size;
    return data;
  }

  void put(void* data) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = sizes_.find(data);
    if (found->second >= kMarked) madvise(data, found->second, MADV_FREE);
    free_.insert({found->second, {data, calls_}});
    sizes_.erase(found);
  }

 private:
  // On a boundary of huge pages, which fault and are marked a few hundred times faster than small ones.
  static void* map(size_t size) {
    void* const data = mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) return nullptr;
    char* const begin = static_cast<char*>(data);
    char* const aligned = begin + (kHugePage - reinterpret_cast<uintptr_t>(begin) % kHugePage) % kHugePage;
    if (aligned > begin) munmap(begin, size_t(aligned - begin));
    munmap(aligned + size, size_t(begin + kHugePage - aligned));
    madvise(aligned, size, MADV_HUGEPAGE);
    return aligned;
  }

  void drop_old() {
    for (auto block = free_.begin(); block != free_.end();) {
      if (calls_ - block->second.returned_at > kKeptCalls) {
        munmap(block->second.data, block->first);
        block = free_.erase(block);
      } else {
        ++block;
      }
    }
  }

  std::mutex mutex_;
  uint64_t calls_ = 0;
  std::multimap<size_t, FreeBlock> free_;  // by size
  std::unordered_map<void*, size_t> sizes_;
};

// Never destroyed: tensors may outlive the end of main.
Blocks& blocks() {
  static Blocks* const blocks = new Blocks;
  return *blocks;
}

}  // namespace

void* take_block(size_t bytes) { return blocks().take(bytes); }
void return_block(void* block) { blocks().put(block); }

}  // namespace mx::cpu
