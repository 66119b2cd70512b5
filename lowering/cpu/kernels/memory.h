// Scratch memory of a call, and the pool that keeps it between calls.
#pragma once

#include <sys/mman.h>
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <deque>
#include <iterator>
#include <mutex>
#include <new>

namespace {

// Asks for huge pages for memory that will be written for the first time now. Faulting it in 4 KiB
// at a time costs a tenth of a sparse call.
inline void advise_huge_pages(void* data, size_t bytes) {
  constexpr uintptr_t PAGE = 4096, HUGE_PAGE = uintptr_t(1) << 21;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + PAGE - 1) / PAGE * PAGE;
  const uintptr_t stop = (reinterpret_cast<uintptr_t>(data) + bytes) / PAGE * PAGE;
  if (stop >= first + 2 * HUGE_PAGE)
    madvise(reinterpret_cast<void*>(first), stop - first, MADV_HUGEPAGE);
}

// Memory is kept between calls, because layers follow one another, and pages that are new to the
// process cost up to a third of a call on 128 tokens: the system clears them first, and may have
// lent them elsewhere.
class MemoryPool {
 public:
  ~MemoryPool() {
    for (const Block& block : blocks_) std::free(block.data);
  }
  // Returns memory of just this size, or null.
  void* take(size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto block = blocks_.rbegin(); block != blocks_.rend(); ++block) {
      if (block->bytes != bytes) continue;
      void* data = block->data;
      total_ -= bytes;
      blocks_.erase(std::next(block).base());
      return data;
    }
    return nullptr;
  }
  // Frees what has not been asked for longest, if it would be more than LIMIT in all.
  void give(void* data, size_t bytes) {
    if (bytes > LIMIT) return std::free(data);
    const std::lock_guard<std::mutex> lock(mutex_);
    while (!blocks_.empty() && total_ + bytes > LIMIT) {
      total_ -= blocks_.front().bytes;
      std::free(blocks_.front().data);
      blocks_.pop_front();
    }
    try {
      blocks_.push_back({data, bytes});
      total_ += bytes;
    } catch (const std::bad_alloc&) {
      std::free(data);
    }
  }

 private:
  static constexpr size_t LIMIT = size_t(64) << 20;
  struct Block {
    void* data;
    size_t bytes;
  };
  std::mutex mutex_;
  std::deque<Block> blocks_;
  size_t total_ = 0;
};

inline MemoryPool& memory_pool() {
  static MemoryPool pool;
  return pool;
}

// Scratch memory of one call. What it holds at first is undefined.
template <typename T>
class Buffer {
 public:
  explicit Buffer(size_t count) {
    constexpr size_t HUGE_PAGE = size_t(1) << 21;
    const size_t bytes = count * sizeof(T);
    const size_t alignment = bytes >= 2 * HUGE_PAGE ? HUGE_PAGE : 64;
    bytes_ = std::max((bytes + alignment - 1) / alignment, size_t(1)) * alignment;
    data_ = static_cast<T*>(memory_pool().take(bytes_));
    if (data_) return;
    data_ = static_cast<T*>(std::aligned_alloc(alignment, bytes_));
    if (!data_) throw std::bad_alloc();
    advise_huge_pages(data_, bytes_);
  }
  ~Buffer() { memory_pool().give(data_, bytes_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return data_; }

 private:
  T* data_;
  size_t bytes_;
};

}  // namespace
