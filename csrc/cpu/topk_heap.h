// The k best (score, item) of one user: a heap whose root is the worst entry. Of equal scores the
// lower item is better, so that the result does not depend on the order of insertion. Empty places
// are (-inf, none). No include guard: a namespace's own copy, as everything the levels share.

template <class A>
RECGRELA_HEAP_INLINE bool is_worse(A score, int64_t item, A than, int64_t than_item) {
  return score < than || (score == than && item > than_item);
}

// Puts (score, item) where the subtree at `hole` of a heap of `count` entries wants it.
template <class A>
RECGRELA_HEAP_INLINE void sift_down(A* scores, int64_t* items, int64_t count, int64_t hole, A score,
                                    int64_t item) {
  for (int64_t child = 2 * hole + 1; child < count; child = 2 * hole + 1) {
    const int64_t other = child + 1;
    if (other < count && is_worse(scores[other], items[other], scores[child], items[child])) {
      child = other;
    }
    if (!is_worse(scores[child], items[child], score, item)) break;
    scores[hole] = scores[child];
    items[hole] = items[child];
    hole = child;
  }
  scores[hole] = score;
  items[hole] = item;
}

// Keeps (score, item) if it is better than the root.
template <class A>
RECGRELA_HEAP_INLINE void offer(A* scores, int64_t* items, int64_t k, A score, int64_t item) {
  if (is_worse(scores[0], items[0], score, item)) sift_down(scores, items, k, 0, score, item);
}

// Best first; the heap is gone.
template <class A>
RECGRELA_HEAP_INLINE void sort_heap(A* scores, int64_t* items, int64_t k) {
  for (int64_t last = k - 1; last > 0; --last) {
    const A score = scores[last];
    const int64_t item = items[last];
    scores[last] = scores[0];
    items[last] = items[0];
    sift_down(scores, items, last, 0, score, item);
  }
}
