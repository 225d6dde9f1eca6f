// The bias by recency of softmax_loss, a tile of rows at a time. Included by every level file.
//
// Rows of a tile whose spans begin together and grow are a run. What their first row reads is
// listed once; from row to row only the items next to a bound of a bucket change, and the new one.
// So a class has a code: 0 not met, 1 to K the bucket in which it stays for the whole run, and
// beyond K one for each class that moves, with a bucket for every row. All that is left is a vector
// of rows per code to add to the scores of a class, and one to sum its gradients in.

// Rows of a tile: what two registers hold. Scores lie transposed, [classes, rows of a tile], so
// that classes are read in place and sums over them need no shuffle.
template <class A>
constexpr int kLossRows = 2 * kLanes<A>;

// Places of a log that may join the span within a run.
template <class A>
constexpr int64_t kRunPlaces = kLossRows<A>;

template <class A>
struct RecencyTile {
  uint16_t* code;       // [classes], all 0 between runs
  int32_t* members;     // [classes]: those with a code
  uint8_t* bucket;      // [codes, kLossRows]: 0 not met, else the bucket, from 1
  A* of_code;           // [codes, kLossRows]: what comes to the scores, or sums of differences
  int64_t* bound;       // [buckets - 1]: where the item met up_to[k]-th last stands
  A* factor;            // [kLossRows]: of a row's differences to its gradient
  int64_t first, last;  // rows of the run: [first, last)
  int64_t met, num_members, num_codes;
};

template <class A>
void take_recency_tile(const SoftmaxLossParams& p, Scratch& memory, RecencyTile<A>& tile) {
  const int64_t codes = (1 + kRunPlaces<A>)*p.buckets + 1;
  tile.code = memory.take<uint16_t>(p.classes);
  tile.members = memory.take<int32_t>(p.classes);
  tile.bucket = memory.take<uint8_t>(codes * kLossRows<A>);
  tile.of_code = memory.take<A>(codes * kLossRows<A>);
  tile.bound = memory.take<int64_t>(p.buckets);
  tile.factor = memory.take<A>(kLossRows<A>);
}

// The buckets of the span [begin, end).
template <class A>
void start_run(const SoftmaxLossParams& p, RecencyTile<A>& tile, int64_t begin, int64_t end) {
  tile.met = tile.num_members = 0;
  tile.num_codes = p.buckets + 1;
  int64_t k = 0;
  for (int64_t at = end - 1; at >= begin; --at) {
    if (p.next_place[at] < end) continue;
    ++tile.met;
    if (k < p.buckets - 1 && tile.met > p.up_to[k]) ++k;
    if (k < p.buckets - 1 && tile.met == p.up_to[k]) tile.bound[k] = at;
    const int32_t j = p.place_class[at];
    if (j < 0) continue;
    tile.code[j] = static_cast<uint16_t>(k + 1);
    tile.members[tile.num_members++] = j;
  }
}

// Class j is in this bucket (from 1) from row i on; j < 0 is no class.
template <class A>
void move_class(const SoftmaxLossParams& p, RecencyTile<A>& tile, int32_t j, int64_t i,
                int64_t bucket) {
  if (j < 0) return;
  uint16_t code = tile.code[j];
  if (code <= p.buckets) {
    if (code == 0) tile.members[tile.num_members++] = j;
    const uint16_t own = static_cast<uint16_t>(tile.num_codes++);
    __builtin_memset(tile.bucket + own * kLossRows<A>, code, std::size_t(i));
    tile.code[j] = code = own;
  }
  __builtin_memset(tile.bucket + code * kLossRows<A> + i, static_cast<int>(bucket),
                   std::size_t(tile.last - i));
}

// The place `at` joins the span that begins at `begin`, for row i and those after it.
template <class A>
void join_span(const SoftmaxLossParams& p, RecencyTile<A>& tile, int64_t begin, int64_t at,
               int64_t i) {
  const int64_t before = p.last_place[at];
  const bool known = before >= begin;
  const auto still_last = [&](int64_t place) { return p.next_place[place] > at; };
  for (int64_t k = 0; k < p.buckets - 1; ++k) {
    if (tile.met < p.up_to[k]) {
      if (known || tile.met + 1 < p.up_to[k]) break;
      int64_t place = begin;  // the bound is reached: by the item met longest ago
      while (!still_last(place)) ++place;
      tile.bound[k] = place;
      break;
    }
    int64_t place = tile.bound[k];
    if (known && before > place) break;  // it was this side of this bound, and of those beyond
    move_class(p, tile, p.place_class[place], i, k + 2);
    do ++place;
    while (!still_last(place));  // ends at `at`
    tile.bound[k] = place;
  }
  tile.met += !known;
  move_class(p, tile, p.place_class[at], i, 1);
}

// Calls f() for every run of the tile's rows, with its codes.
template <class A, class F>
void for_runs(const SoftmaxLossParams& p, RecencyTile<A>& tile, int64_t first, int64_t rows,
              F&& f) {
  for (int64_t i = 0; i < rows; i = tile.last) {
    const int64_t begin = p.span_begin[p.rows[first + i]], end = p.span_end[p.rows[first + i]];
    tile.first = i;
    tile.last = i + 1;
    if (begin >= end) continue;
    for (int64_t now = end; tile.last < rows; ++tile.last) {
      const int64_t row = p.rows[first + tile.last], later = p.span_end[row];
      if (p.span_begin[row] != begin || later < now || later - end > kRunPlaces<A>) break;
      now = later;
    }
    start_run(p, tile, begin, end);
    int64_t at = end;
    for (int64_t row = i + 1; row < tile.last; ++row) {
      for (; at < p.span_end[p.rows[first + row]]; ++at) join_span(p, tile, begin, at, row);
    }
    f();
    for (int64_t m = 0; m < tile.num_members; ++m) tile.code[tile.members[m]] = 0;
  }
}

// Calls f(code, row of the tile, bucket from 1) for every code and row of the run that have one.
template <class A, class F>
RECGRELA_INLINE void for_buckets(const SoftmaxLossParams& p, const RecencyTile<A>& tile, F&& f) {
  for (int64_t c = 1; c < tile.num_codes; ++c) {
    const uint8_t* own = tile.bucket + c * kLossRows<A>;
    for (int64_t i = tile.first; i < tile.last; ++i) {
      const int64_t bucket = c <= p.buckets ? c : own[i];
      if (bucket > 0) f(c, i, bucket);
    }
  }
}

// Calls f(rows of its code, rows of the class in `scores`) for every class that has a code.
template <class A, class B, class F>
RECGRELA_INLINE void for_members(const RecencyTile<A>& tile, B* scores, F&& f) {
  for (int64_t m = 0; m < tile.num_members; ++m) {
    const int64_t j = tile.members[m];
    f(tile.of_code + tile.code[j] * kLossRows<A>, scores + j * kLossRows<A>);
  }
}

template <class A>
RECGRELA_INLINE void add_rows(const A* from, A* to) {
  for (int v = 0; v < 2; ++v, to += kLanes<A>, from += kLanes<A>) {
    store_vector(load_vector(to) + load_vector(from), to);
  }
}

// scores += bias, of all rows of a tile of scores [classes, kLossRows].
template <class A>
RECGRELA_NOINLINE void add_recency_bias(const SoftmaxLossParams& p, RecencyTile<A>& tile, A* scores,
                                        int64_t first, int64_t rows) {
  const A* values = static_cast<const A*>(p.bias_values);
  for_runs(p, tile, first, rows, [&] {
    for (int64_t x = 0; x < tile.num_codes * kLossRows<A>; ++x) tile.of_code[x] = A(0);
    for_buckets(p, tile, [&](int64_t c, int64_t i, int64_t bucket) {
      tile.of_code[c * kLossRows<A> + i] = values[bucket - 1];
    });
    for_members(tile, scores, [](const A* own, A* score) { add_rows(own, score); });
  });
}

// Sums the gradients of the values over the tile, from differences that `factor` of their row turns
// into the gradients of scores.
template <class A>
RECGRELA_NOINLINE void sum_recency_gradients(const SoftmaxLossParams& p, RecencyTile<A>& tile,
                                             const A* differences, int64_t first, int64_t rows,
                                             double* sums) {
  for_runs(p, tile, first, rows, [&] {
    for (int64_t x = 0; x < tile.num_codes * kLossRows<A>; ++x) tile.of_code[x] = A(0);
    for_members(tile, differences, [](A* own, const A* difference) { add_rows(difference, own); });
    for_buckets(p, tile, [&](int64_t c, int64_t i, int64_t bucket) {
      const A sum = tile.of_code[c * kLossRows<A> + i];
      // a row that is not finite reaches its own buckets alone
      if (sum != A(0)) sums[bucket - 1] += double(sum) * double(tile.factor[i]);
    });
  });
}
