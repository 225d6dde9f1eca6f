// The running sums of linear attention, S [D, D] and z [D]. Included by every level file.
//
// A float32 sum that has grown large rounds every further item away: after 4,000 items the error is
// 50 units in the last place. So the last items have a sum of their own, which starts at zero and
// is added to the rest as a whole. A short history does without: reading two sums costs more.
//
// A history of more than kSegment items is summed segment by segment, each from zero, so that other
// threads may have made the sums of earlier segments: with the same bits, in one pass or in two.

constexpr int kFirstItems = 256, kRecentItems = 128;  // multiples of kChunk

template <class A>
struct RunningState {
  A *kv, *k_sum;                // [Dp, Dp], [Dp]: of the recent items
  A *kv_base, *k_sum_base;      // of those before
  A *kv_own, *k_sum_own;        // the base without what came before this segment
  A *kv_before, *k_sum_before;  // of the segments before
  bool has_base, has_segments;
  int recent;
};

template <class A>
void lay_out(RunningState<A>& s, Scratch& scratch, int64_t Dp) {
  for (A** kv : {&s.kv, &s.kv_base, &s.kv_own, &s.kv_before}) *kv = scratch.take<A>(Dp * Dp);
  for (A** k_sum : {&s.k_sum, &s.k_sum_base, &s.k_sum_own, &s.k_sum_before}) {
    *k_sum = scratch.take<A>(Dp);
  }
}

template <class A>
void clear(A* x, int64_t count) {
  __builtin_memset(x, 0, std::size_t(count) * sizeof(A));
}

template <class A>
void clear(RunningState<A>& s, int64_t Dp, bool has_segments = false) {
  for (A* kv : {s.kv, s.kv_base}) clear(kv, Dp * Dp);
  for (A* k_sum : {s.k_sum, s.k_sum_base}) clear(k_sum, Dp);
  s.has_base = false;
  s.recent = 0;
  s.has_segments = has_segments;
  if (!has_segments) return;
  for (A* kv : {s.kv_own, s.kv_before}) clear(kv, Dp * Dp);
  for (A* k_sum : {s.k_sum_own, s.k_sum_before}) clear(k_sum, Dp);
}

template <class A>
void add_to(A* sum, const A* x, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<A>) {
    store_vector(load_vector(sum + i) + load_vector(x + i), sum + i);
  }
}

// base += recent; recent = 0
template <class A>
void join_base(A* base, A* recent, int64_t count) {
  add_to(base, recent, count);
  clear(recent, count);
}

// Whether the n items just added fill the recent sums, which then have to join the base.
template <class A>
bool has_filled(RunningState<A>& s, int n) {
  s.recent += n;
  if (s.recent < (s.has_base ? kRecentItems : kFirstItems)) return false;
  s.recent = 0;
  s.has_base = true;
  return true;
}

template <class A>
void moved_on(RunningState<A>& s, int n, int64_t Dp) {
  if (!has_filled(s, n)) return;
  if (s.has_segments) {
    add_to(s.kv_own, s.kv, Dp * Dp);
    add_to(s.k_sum_own, s.k_sum, Dp);
  }
  join_base(s.kv_base, s.kv, Dp * Dp);
  join_base(s.k_sum_base, s.k_sum, Dp);
}

// The sums of this segment alone are left in kv_own and k_sum_own.
template <class A>
void finish_segment(RunningState<A>& s, int64_t Dp) {
  join_base(s.kv_own, s.kv, Dp * Dp);
  join_base(s.k_sum_own, s.k_sum, Dp);
  s.recent = 0;
}
template <class A>
void next_segment(RunningState<A>& s, int64_t Dp) {
  finish_segment(s, Dp);
  join_base(s.kv_before, s.kv_own, Dp * Dp);
  join_base(s.k_sum_before, s.k_sum_own, Dp);
  __builtin_memcpy(s.kv_base, s.kv_before, std::size_t(Dp * Dp) * sizeof(A));
  __builtin_memcpy(s.k_sum_base, s.k_sum_before, std::size_t(Dp) * sizeof(A));
  s.has_base = true;
}

// A square [D, D] into rows of Dp, and the sum of two back.
template <class A>
void spread_rows(const A* from, A* to, int64_t D, int64_t Dp) {
  for (int64_t i = 0; i < D; ++i) {
    __builtin_memcpy(to + i * Dp, from + i * D, std::size_t(D) * sizeof(A));
  }
}
template <class A>
void gather_sum(const A* x, const A* y, A* to, int64_t rows, int64_t D, int64_t Dp) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < D; ++j) to[i * D + j] = x[i * Dp + j] + y[i * Dp + j];
  }
}

// What came before the items to come: kv [D, D] and k_sum [D].
template <class A>
void start_from(RunningState<A>& s, const A* kv, const A* k_sum, int64_t D, int64_t Dp) {
  spread_rows(kv, s.kv_base, D, Dp);
  __builtin_memcpy(s.k_sum_base, k_sum, std::size_t(D) * sizeof(A));
  s.has_base = true;
  if (!s.has_segments) return;
  spread_rows(kv, s.kv_before, D, Dp);
  __builtin_memcpy(s.k_sum_before, k_sum, std::size_t(D) * sizeof(A));
}
// A user's state of head h.
template <class A>
void load_state(RunningState<A>& s, const States& state, int64_t b, int64_t h, int64_t D,
                int64_t Dp) {
  start_from(s, static_cast<const A*>(state.kv) + b * state.kv_stride + h * D * D,
             static_cast<const A*>(state.k_sum) + b * state.k_sum_stride + h * D, D, Dp);
}

// The whole of a running state.
template <class A>
void store_sum(const RunningState<A>& s, A* kv, A* k_sum, int64_t D, int64_t Dp) {
  gather_sum(s.kv, s.kv_base, kv, D, D, Dp);
  gather_sum(s.k_sum, s.k_sum_base, k_sum, 1, D, Dp);
}
template <class A>
void store_state(const RunningState<A>& s, const States& state, int64_t b, int64_t h, int64_t D,
                 int64_t Dp) {
  store_sum(s, static_cast<A*>(state.kv) + b * state.kv_stride + h * D * D,
            static_cast<A*>(state.k_sum) + b * state.k_sum_stride + h * D, D, Dp);
}
