// The running sums of linear attention, S [D, D] and z [D]. Included by every level file.
//
// A float32 sum that has grown large rounds every further item away: after 4,000 items the error is
// 50 units in the last place. So the last items have a sum of their own, which starts at zero and is
// added to the rest as a whole. A short history does without: reading two sums costs more.

constexpr int kFirstItems = 256, kRecentItems = 128;  // multiples of kChunk

template <class A>
struct RunningState {
  A *kv, *k_sum;            // [Dp, Dp], [Dp]: of the recent items
  A *kv_base, *k_sum_base;  // of those before
  bool has_base;
  int recent;
};

template <class A>
void lay_out(RunningState<A>& s, Scratch& scratch, int64_t Dp) {
  s.kv = scratch.take<A>(Dp * Dp);
  s.k_sum = scratch.take<A>(Dp);
  s.kv_base = scratch.take<A>(Dp * Dp);
  s.k_sum_base = scratch.take<A>(Dp);
}

template <class A>
void clear(A* x, int64_t count) {
  __builtin_memset(x, 0, std::size_t(count) * sizeof(A));
}

template <class A>
void clear(RunningState<A>& s, int64_t Dp) {
  clear(s.kv, Dp * Dp);
  clear(s.k_sum, Dp);
  clear(s.kv_base, Dp * Dp);
  clear(s.k_sum_base, Dp);
  s.has_base = false;
  s.recent = 0;
}

// base += recent; recent = 0
template <class A>
void join_base(A* base, A* recent, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<A>) {
    store_vector(load_vector(base + i) + load_vector(recent + i), base + i);
    store_vector(Vec<A>{}, recent + i);
  }
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
  join_base(s.kv_base, s.kv, Dp * Dp);
  join_base(s.k_sum_base, s.k_sum, Dp);
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

// A user's state of head h into the base.
template <class A>
void load_state(RunningState<A>& s, const States& state, int64_t b, int64_t h, int64_t D,
                int64_t Dp) {
  spread_rows(static_cast<const A*>(state.kv) + b * state.kv_stride + h * D * D, s.kv_base, D, Dp);
  __builtin_memcpy(s.k_sum_base,
                   static_cast<const A*>(state.k_sum) + b * state.k_sum_stride + h * D,
                   std::size_t(D) * sizeof(A));
  s.has_base = true;
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
