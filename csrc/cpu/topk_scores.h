// Inner products of users and items, and the k best items of each user, in one pass: a block of
// scores lives in registers and is compared with every user's k-th score so far; almost always
// nothing exceeds it, and the scores are never written. Included by every level file.
//
// Users lie in the lanes of vectors, kUserVectors of them side by side; kItemRows items are read as
// scalars. Where there are few users items lie in the lanes instead (scan_few). Either way a score
// is one sum in the order of the width, so it depends on its user and item alone.
#define RECGRELA_HEAP_INLINE inline
#include "topk_heap.h"
#undef RECGRELA_HEAP_INLINE

// As many sums as the level's registers hold. Vectors of exactly a register: the compiler keeps
// larger ones in memory.
constexpr int kRegisterBytes = RECGRELA_VECTOR_BYTES;
constexpr int kItemRows = kRegisterBytes == 64 ? 12 : 6;
constexpr int kUserVectors = 2;
constexpr int kDirectPanels = 2;
constexpr int kFewUsers = kRegisterBytes == 64 ? 8 : 4;  // at once, beside a square of kLanes items
template <class A>
constexpr int kRegisterLanes = kRegisterBytes / sizeof(A);
template <class A>
constexpr int kPanelUsers = kUserVectors * kRegisterLanes<A>;
template <class A>
struct RegisterOf {
  typedef A type __attribute__((vector_size(kRegisterBytes), aligned(sizeof(A)), may_alias));
};
template <class A>
using Register = typename RegisterOf<A>::type;

// Users [first, last) of a group, their vectors as [panel, width, kPanelUsers], and what a score
// must exceed.
template <class A>
struct UserPanels {
  int64_t first, last;
  A *vectors, *limits;
};

template <class A>
A* heap_scores(const TopKParams& p, int64_t part, int64_t user) {
  return static_cast<A*>(p.scores) + (part * p.users + user) * p.k;
}
inline int64_t* heap_items(const TopKParams& p, int64_t part, int64_t user) {
  return p.items + (part * p.users + user) * p.k;
}

template <class A>
void pack_users(const TopKParams& p, const UserPanels<A>& to) {
  constexpr int kUsers = kPanelUsers<A>;
  for (int64_t u = to.first; u < to.last; ++u) {
    const int64_t at = u - to.first;
    const A* from = static_cast<const A*>(p.hidden) + u * p.width;
    A* panel = to.vectors + at / kUsers * p.width * kUsers + at % kUsers;
    for (int64_t i = 0; i < p.width; ++i) panel[i * kUsers] = from[i];
    to.limits[at] = -A(INFINITY);
  }
}

// Items first, first + 1, ... (rows of the table, or places in a list) as [panel, width,
// kItemRows]; the last panel is filled up with zeros.
template <class A, class S>
void pack_items(const TopKParams& p, const S* table, const int64_t* list, int64_t first,
                int64_t count, A* to) {
  for (int64_t i = 0; i < (count + kItemRows - 1) / kItemRows * kItemRows; ++i) {
    A* panel = to + i / kItemRows * p.width * kItemRows + i % kItemRows;
    if (i >= count) {
      for (int64_t c = 0; c < p.width; ++c) panel[c * kItemRows] = A(0);
      continue;
    }
    const int64_t row = list ? list[first + i] : first + i;
    const S* from = table + row * p.table_stride;
    if constexpr (sizeof(S) == 1) {
      const float scale = p.scale[row];
      for (int64_t c = 0; c < p.width; ++c) panel[c * kItemRows] = scale * float(from[c]);
    } else {
      for (int64_t c = 0; c < p.width; ++c) panel[c * kItemRows] = A(widen(from[c]));
    }
  }
}

template <class A>
RECGRELA_INLINE bool any_above(Register<A> x, Register<A> limit) {
  constexpr int kWords = kRegisterBytes / 8;
  const auto above = x > limit;
  int64_t words[kWords], any = 0;
  __builtin_memcpy(words, &above, sizeof(words));
  for (int i = 0; i < kWords; ++i) any |= words[i];
  return any != 0;
}

// Whether the sorted list [count] holds the item.
inline bool holds(const int64_t* list, int64_t count, int64_t item) {
  int64_t low = 0, high = count;  // the first entry not below the item lies in [low, high]
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (list[middle] < item) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low < count && list[low] == item;
}

// What becomes of a score that may exceed its user's limit.
template <class A>
RECGRELA_INLINE void keep_score(const TopKParams& p, int64_t user, A& limit, A score, int64_t item,
                                int64_t part) {
  if (item == p.padding || !(score > limit)) return;
  if (p.seen && holds(p.seen + user * p.num_seen, p.num_seen, item)) return;
  A* best = heap_scores<A>(p, part, user);
  sift_down(best, heap_items(p, part, user), p.k, 0, score, item);
  limit = best[0];
}

// The rare case: some score of a block exceeds its user's limit.
template <class A>
RECGRELA_NOINLINE void keep_scores(const TopKParams& p, const UserPanels<A>& users, int64_t panel,
                                   const A* scores, const int64_t* list, int64_t first,
                                   int64_t count, int64_t part) {
  constexpr int kUsers = kPanelUsers<A>;
  const int64_t begin = users.first + panel * kUsers;
  const int64_t present = users.last - begin < kUsers ? users.last - begin : kUsers;
  A* limits = users.limits + panel * kUsers;
  for (int64_t r = 0; r < count; ++r) {
    const int64_t item = list ? list[first + r] : first + r;
    for (int64_t lane = 0; lane < present; ++lane) {
      keep_score(p, begin + lane, limits[lane], scores[r * kUsers + lane], item, part);
    }
  }
}

// One panel of users against kItemRows items: packed, or where kDirect as rows of the table.
template <bool kDirect, class A>
RECGRELA_INLINE void score_panel(const TopKParams& p, const UserPanels<A>& users, int64_t panel,
                                 const A* const* rows, const A* packed, const int64_t* list,
                                 int64_t first, int64_t count, int64_t part) {
  constexpr int kUsers = kPanelUsers<A>;
  const A* vectors = users.vectors + panel * p.width * kUsers;
  Register<A> sums[kItemRows][kUserVectors] = {};
  for (int64_t c = 0; c < p.width; ++c) {
    const Register<A>* user = reinterpret_cast<const Register<A>*>(vectors + c * kUsers);
    const Register<A> user0 = user[0], user1 = user[1];
    for (int r = 0; r < kItemRows; ++r) {
      const A item = kDirect ? rows[r][c] : packed[c * kItemRows + r];
      sums[r][0] += user0 * item;
      sums[r][1] += user1 * item;
    }
  }
  const auto* limits = reinterpret_cast<const Register<A>*>(users.limits + panel * kUsers);
  bool any = false;
  for (int j = 0; j < kUserVectors; ++j) {
    Register<A> largest = limits[j];  // NaN is never larger
    for (int r = 0; r < kItemRows; ++r) largest = sums[r][j] > largest ? sums[r][j] : largest;
    any |= any_above<A>(largest, limits[j]);
  }
  if (!any) return;
  A scores[kItemRows * kUsers];
  __builtin_memcpy(scores, sums, sizeof(scores));
  keep_scores(p, users, panel, scores, list, first, count, part);
}

// All users of a group against items [begin, end), a block at a time; for few users packing the
// items would cost more than it saves.
template <class A, class S>
void scan_items(const TopKParams& p, const UserPanels<A>& users, const int64_t* list, int64_t begin,
                int64_t end, int64_t part, A* block) {
  const int64_t panels = (users.last - users.first + kPanelUsers<A> - 1) / kPanelUsers<A>;
  const S* table = static_cast<const S*>(p.table);
  const bool direct = std::is_same_v<A, S> && panels <= kDirectPanels;
  for (int64_t first = begin; first < end; first += kBlockItems) {
    const int64_t count = end - first < kBlockItems ? end - first : kBlockItems;
    if (!direct) pack_items(p, table, list, first, count, block);
    for (int64_t panel = 0; panel < panels; ++panel) {
      for (int64_t i = 0; i < count; i += kItemRows) {
        const int64_t rows = count - i < kItemRows ? count - i : kItemRows;
        if constexpr (std::is_same_v<A, S>) {
          if (direct) {
            const A* from[kItemRows];
            for (int64_t r = 0; r < kItemRows; ++r) {
              const int64_t place = first + i + (r < rows ? r : rows - 1);
              from[r] = table + (list ? list[place] : place) * p.table_stride;
            }
            score_panel<true>(p, users, panel, from, block, list, first + i, rows, part);
            continue;
          }
        }
        const A* packed = block + i * p.width;
        score_panel<false, A>(p, users, panel, nullptr, packed, list, first + i, rows, part);
      }
    }
  }
}

// kLanes columns of an item; an int8 item is multiplied by its scale.
template <class A, class S>
RECGRELA_INLINE Vec<A> item_columns(const S* from, float scale) {
  if constexpr (sizeof(S) == 1) {
    return scale * widen_bytes(from);
  } else {
    A wide[kLanes<A>];
    for (int j = 0; j < kLanes<A>; ++j) wide[j] = A(widen(from[j]));
    return load_vector(wide);
  }
}

// Users [user, user + kUsers) against items [begin, end), which lie in the lanes: a square of the
// table, kLanes items by kLanes columns, is turned in registers.
template <int kUsers, class A, class S>
RECGRELA_NOINLINE void scan_few(const TopKParams& p, int64_t user, A* limits, const int64_t* list,
                                int64_t begin, int64_t end, int64_t part) {
  constexpr int L = kLanes<A>;
  const int64_t row_bytes = p.width * int64_t(sizeof(S));
  const S* table = static_cast<const S*>(p.table);
  const A* hidden = static_cast<const A*>(p.hidden) + user * p.width;
  for (int64_t first = begin; first < end; first += L) {
    const int64_t count = end - first < L ? end - first : L;
    const S* rows[L];
    float scales[L];
    for (int64_t r = 0; r < L; ++r) {
      const int64_t place = first + (r < count ? r : count - 1);
      const int64_t row = list ? list[place] : place;
      rows[r] = table + row * p.table_stride;
      scales[r] = p.scale ? p.scale[row] : 1.0f;
    }
    for (int64_t r = 0; !list && r < L; ++r) {  // the next items, in the memory's order
      const char* next = reinterpret_cast<const char*>(rows[r] + L * p.table_stride);
      for (int64_t b = 0; b < row_bytes; b += 64) __builtin_prefetch(next + b);
    }
    Vec<A> sums[kUsers] = {};
    int64_t c = 0;
    for (; c + L <= p.width; c += L) {
      Vec<A> square[L];
      for (int r = 0; r < L; ++r) square[r] = item_columns<A>(rows[r] + c, scales[r]);
      turn_square<A>(square);
      for (int j = 0; j < L; ++j) {
        for (int u = 0; u < kUsers; ++u) sums[u] += square[j] * hidden[u * p.width + c + j];
      }
    }
    for (; c < p.width; ++c) {
      A column[L];
      for (int r = 0; r < L; ++r) {
        if constexpr (sizeof(S) == 1) {
          column[r] = scales[r] * float(rows[r][c]);
        } else {
          column[r] = A(widen(rows[r][c]));
        }
      }
      const Vec<A> items = load_vector(column);
      for (int u = 0; u < kUsers; ++u) sums[u] += items * hidden[u * p.width + c];
    }
    for (int u = 0; u < kUsers; ++u) {
      if (!any_above<A>(sums[u], splat(limits[u]))) continue;
      A scores[L];
      store_vector(sums[u], scores);
      for (int64_t r = 0; r < count; ++r) {
        const int64_t item = list ? list[first + r] : first + r;
        keep_score(p, user + u, limits[u], scores[r], item, part);
      }
    }
  }
}

// All users of a group against items [begin, end), by the way that suits their number.
template <class A, class S>
void scan(const TopKParams& p, const UserPanels<A>& users, const int64_t* list, int64_t begin,
          int64_t end, int64_t part, A* block) {
  const int64_t present = users.last - users.first;
  if (present > kFewUsers) {
    pack_users(p, users);
    scan_items<A, S>(p, users, list, begin, end, part, block);
    return;
  }
  for (int64_t u = 0; u < present; ++u) users.limits[u] = -A(INFINITY);
  with_constant<kFewUsers>(present, [&](auto few) {
    scan_few<few(), A, S>(p, users.first, users.limits, list, begin, end, part);
  });
}

// A group of users and one part of the items.
template <class A, class S>
void score_group(const TopKParams& p, int64_t group, int64_t part) {
  UserPanels<A> users;
  A* block;
  users.first = group * kGroupUsers;
  users.last = p.users - users.first < kGroupUsers ? p.users : users.first + kGroupUsers;
  const bool own_lists = p.candidates && p.candidates_stride > 0;
  const int64_t here = own_lists ? 1 : users.last - users.first;
  const int64_t lanes = (here + kPanelUsers<A> - 1) / kPanelUsers<A> * kPanelUsers<A>;
  const int64_t padded_block = (kBlockItems + kItemRows - 1) / kItemRows * kItemRows;
  const auto layout = [&](Scratch& memory) {
    users.vectors = memory.take<A>(lanes * p.width);
    users.limits = memory.take<A>(lanes);
    block = memory.take<A>(padded_block * p.width);
  };
  with_scratch(layout, [&] {
    for (int64_t i = 0; i < lanes; ++i) users.limits[i] = A(INFINITY);  // of lanes without a user
    if (own_lists) {
      for (int64_t user = users.first; user < users.last; ++user) {
        UserPanels<A> one = users;
        one.first = user;
        one.last = user + 1;
        const int64_t* list = p.candidates + user * p.candidates_stride;
        scan<A, S>(p, one, list, 0, p.num_items, part, block);
      }
    } else {
      const int64_t share = (p.num_items + p.parts - 1) / p.parts;
      const int64_t begin = part * share;
      const int64_t end = p.num_items - begin < share ? p.num_items : begin + share;
      scan<A, S>(p, users, p.candidates, begin, end, part, block);
    }
  });
}

inline void topk_scores(const TopKParams& p, int64_t begin, int64_t end) {
  for (int64_t w = begin; w < end; ++w) {
    const int64_t group = w / p.parts, part = w % p.parts;
    if (p.scale) {
      score_group<float, int8_t>(p, group, part);
    } else if (p.table_type == DType::kDouble) {
      score_group<double, double>(p, group, part);
    } else {
      with_storage<float>(p.table_type, [&](auto* type) {
        score_group<float, std::remove_pointer_t<decltype(type)>>(p, group, part);
      });
    }
  }
}
