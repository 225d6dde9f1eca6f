// The CUDA kernels' own source, run on the CPU by the shim, against double precision. Arguments:
// nothing for the short set in three orders of threads; "long" and a number for every shape in that
// order alone (0 forward, 1 reverse, others shuffled); "first" to end at the first failure, and the
// words a case's name must hold, or those alone. Compiled with races.h's detector, the short set in
// one order.
#include <memory>

#include "cases.h"
#include "races.h"

bool tensor_core_twins_hold();  // test_tensor_core.cpp

namespace {

using namespace harness;

int failures = 0, checks = 0;
bool verbose = false, stop_at_first = false;

void expect(bool holds, const std::string& name, const std::string& what, double value) {
  ++checks;
  failures += !holds;
  if (!holds || verbose) {
    std::printf("%s %s: %s (%.3g)\n", holds ? "ok  " : "FAIL", name.c_str(), what.c_str(), value);
  }
  if (!holds && stop_at_first) std::exit(1);
}

// Units in the last place. float32 and float64: what summing in another order costs. Two-byte
// rows: the one rounding at the end, half a unit, and what the float32 sums before it add.
double row_limit(DType dtype) {
  return dtype == DType::kFloat ? 12 : (dtype == DType::kDouble ? 64 : 0.75);
}

void check_forward(const Case& c, const reference::Problem& p, const reference::Result& expected,
                   Run& run) {
  const DType acc = run.acc;
  // Tensor cores sum keys of 16 bits: 2e-5 of the scale, the rule for states (tests/tolerance.py).
  const bool cut = (c.dtype == DType::kBFloat16 || c.dtype == DType::kHalf) && c.D >= 64;
  const double sums = acc == DType::kDouble ? 64 : (cut ? 2e-5 * 0x1p23 : 24);
  const double off = error_of(run.out.values(), expected.out, c.D, digits_of(c.dtype));
  expect(off <= row_limit(c.dtype), c.name, "out", off);
  expect(run.out.gaps_untouched(), c.name, "nothing is written between the rows", 0);
  if (!c.final) return;
  const double kv = error_of(run.final_kv.values(), expected.kv, c.D * c.D, digits_of(acc));
  expect(kv <= sums, c.name, "final kv", kv);
  const double k_sum = error_of(run.final_k_sum.values(), expected.k_sum, c.D, digits_of(acc));
  expect(k_sum <= (acc == DType::kDouble ? 64 : 24), c.name, "final k_sum", k_sum);
  const double conv = error_of(run.final_conv.values(), expected.conv, 1, digits_of(acc));
  expect(conv == 0, c.name, "final conv", conv);
  (void)p;
}

// The scale of gradients is the largest of the whole tensor: R^T (S dnum) and dden z cancel, at a
// sequence's first item to nothing.
void check_backward(const Case& c, const reference::Problem& p, Run& run) {
  Random random(5);
  const int64_t C = p.H * p.D;
  const Values dy = random.values(p.items * C, c.dtype);
  reference::Result dfinal;
  if (c.grad_final) {
    dfinal = {{},
              random.values(p.B * C * p.D, run.acc),
              random.values(p.B * C, run.acc),
              random.values(p.B * (p.W - 1) * C, run.acc)};
  }
  const reference::Gradients expected = reference::backward(p, dy, dfinal);
  const int error = run.backward(dy, dfinal);
  expect(error == 0, c.name, "launch backward", error);
  const double limit = c.dtype == DType::kFloat ? 40 : c.dtype == DType::kDouble ? 200 : 0.75;
  const auto rows = [&](const char* what, RowBuffer& got, const Values& wanted) {
    const double off = error_of(got.values(), wanted, int64_t(wanted.size()), digits_of(c.dtype));
    expect(off <= limit, c.name, what, off);
    expect(got.gaps_untouched(), c.name, "nothing is written between the rows", 0);
  };
  rows("dq", run.dq, expected.q);
  rows("dk", run.dk, expected.k);
  rows("dv", run.dv, expected.v);
  if (c.gate) rows("dgate", run.dgate, expected.gate);
  const int digits = digits_of(run.acc);
  const auto dense = [&](const char* what, const Dense& got, const Values& wanted, int64_t width) {
    const double off = error_of(got.values(), wanted, width, digits);
    expect(off <= (run.acc == DType::kDouble ? 200 : 40), c.name, what, off);
  };
  if (c.conv) dense("dweight", run.dweight, expected.weight, C * p.W);
  if (c.conv && c.bias) dense("dbias", run.dbias, expected.bias, C);
  if (!c.initial) return;
  dense("dkv", run.dkv, expected.kv, p.D * p.D);
  dense("dk_sum", run.dk_sum, expected.k_sum, p.D);
  if (p.W > 1) dense("dconv", run.dconv, expected.conv, C);
}

int races_before = 0;

void expect_no_race(const std::string& name) {
  const int more = races::found() - races_before;
  if (races::watched) expect(more == 0, name, "no two threads race", more);
  races_before = races::found();
}

void run_case(const Case& c, unsigned seed) {
  const reference::Problem p = random_problem(c, seed);
  Run run(c, p);
  const int error = run.forward(true);
  expect(error == 0, c.name, "launch", error);
  check_forward(c, p, reference::forward(p), run);
  check_backward(c, p, run);
  expect_no_race(c.name);
}

// The reference's gradients against differences of its outputs: the loss is a weighted sum of them.
void check_reference() {
  Case c;
  c.H = 1;
  c.D = 4;
  c.dtype = DType::kDouble;
  c.lengths = {4, 2};
  c.layout = Layout::kPacked;
  c.initial = true;
  reference::Problem p = random_problem(c, 3);
  Random random(4);
  const Values dy = random.values(p.items * p.D, c.dtype);
  const reference::Result dfinal{{},
                                 random.values(p.B * p.D * p.D, c.dtype),
                                 random.values(p.B * p.D, c.dtype),
                                 random.values(p.B * (p.W - 1) * p.D, c.dtype)};
  const auto loss = [&] {
    const reference::Result r = reference::forward(p);
    double sum = 0;
    for (std::size_t i = 0; i < dy.size(); ++i) sum += dy[i] * r.out[i];
    for (std::size_t i = 0; i < r.kv.size(); ++i) sum += dfinal.kv[i] * r.kv[i];
    for (std::size_t i = 0; i < r.k_sum.size(); ++i) sum += dfinal.k_sum[i] * r.k_sum[i];
    for (std::size_t i = 0; i < r.conv.size(); ++i) sum += dfinal.conv[i] * r.conv[i];
    return sum;
  };
  const reference::Gradients g = reference::backward(p, dy, dfinal);
  const std::pair<Values*, const Values*> pairs[] = {
      {&p.q, &g.q},       {&p.k, &g.k},           {&p.v, &g.v},
      {&p.gate, &g.gate}, {&p.weight, &g.weight}, {&p.bias, &g.bias},
      {&p.kv, &g.kv},     {&p.k_sum, &g.k_sum},   {&p.conv, &g.conv}};
  double worst = 0;
  for (const auto& [input, gradient] : pairs) {
    for (std::size_t i = 0; i < input->size(); ++i) {
      const double x = (*input)[i], step = 1e-5;
      (*input)[i] = x + step;
      const double above = loss();
      (*input)[i] = x - step;
      const double slope = (above - loss()) / (2 * step);
      (*input)[i] = x;
      worst = std::fmax(worst, std::fabs(slope - (*gradient)[i]) / (1 + std::fabs(slope)));
    }
  }
  expect(worst < 1e-7, "reference", "gradients are the slopes of the outputs", worst);
}

bool all_nan(const Values& values, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    if (values[i] == values[i]) return false;
  }
  return true;
}

// Lengths and offsets that make no sense: NaN in the sequences concerned, the others untouched, and
// no access outside the tensors, which AddressSanitizer sees.
void check_malformed(int64_t D, DType dtype, Layout layout, int64_t entry, int64_t value,
                     std::vector<int64_t> broken) {
  Case c;
  c.name = "malformed D" + std::to_string(D) + " " + name_of(dtype) + " " + std::to_string(entry) +
           "=" + std::to_string(value);
  c.D = D;
  c.H = 1;
  c.dtype = dtype;
  c.layout = layout;
  c.lengths = {5, 9, 4, 6};
  c.final = c.initial = true;
  const reference::Problem p = random_problem(c, 9);
  const reference::Result expected = reference::forward(p);
  Run run(c, p);
  std::vector<int64_t>& values = layout == Layout::kPacked ? run.cu_seqlens : run.lengths;
  values[entry] = value;
  for (std::size_t i = entry; layout == Layout::kPacked && value > p.items && i < values.size();
       ++i)
    values[i] = value;  // and so do not decrease behind it
  expect(run.forward(true) == 0, c.name, "launch", 0);
  const Values dy(p.items * D, 1.0);
  expect(run.backward(dy, {}) == 0, c.name, "launch backward", 0);
  const Values out = run.out.values(), dk = run.dk.values(), kv = run.final_kv.values();
  for (int64_t b = 0; b < p.B; ++b) {
    const reference::Sequence s = p.sequences[b];
    bool is_broken = false;
    for (int64_t x : broken) is_broken = is_broken || x == b;
    const int64_t begin = s.first * D, end = (s.first + s.length) * D;
    if (is_broken) {
      const bool nan = all_nan(out, begin, end) && all_nan(dk, begin, end) &&
                       all_nan(kv, b * D * D, (b + 1) * D * D);
      expect(nan, c.name, "a broken sequence is NaN", double(b));
    } else {
      const Values got(out.begin() + begin, out.begin() + end);
      const Values wanted(expected.out.begin() + begin, expected.out.begin() + end);
      const double off = error_of(got, wanted, D, digits_of(dtype));
      expect(off <= row_limit(dtype), c.name, "the others are right", off);
    }
  }
}

void check_malformed() {
  for (int64_t D : {6, 16, 128}) {
    for (DType dtype : {DType::kFloat, DType::kDouble}) {
      if (D == 128 && dtype == DType::kDouble) continue;  // as D 6
      check_malformed(D, dtype, Layout::kPadded, 1, -1, {1});
      check_malformed(D, dtype, Layout::kPadded, 2, 1000000000, {2});
      check_malformed(D, dtype, Layout::kPacked, 2, 3, {0, 1, 2});  // decreases
      check_malformed(D, dtype, Layout::kPacked, 4, 1000000000, {3});
      check_malformed(D, dtype, Layout::kPacked, 2, 1000000000, {1, 2, 3});
      check_malformed(D, dtype, Layout::kPacked, 0, -7, {0});
    }
  }
  check_malformed(64, DType::kBFloat16, Layout::kPadded, 2, 1000000000, {2});
  check_malformed(64, DType::kBFloat16, Layout::kPacked, 2, 3, {0, 1, 2});
  races_before = races::found();  // where broken offsets overlap, NaN is written twice
}

// NaN, infinity and huge numbers of one user change no bit of another's.
void check_sick_user(DType dtype, int64_t D) {
  Case c;
  c.name = "sick user D" + std::to_string(D) + " " + name_of(dtype);
  c.D = D;
  c.H = 1;
  c.dtype = dtype;
  c.layout = Layout::kPacked;
  c.lengths = {35, 40, 9};
  c.final = c.initial = true;
  const reference::Problem p = random_problem(c, 21);
  Run well(c, p);
  expect(well.forward(false) == 0, c.name, "launch", 0);
  for (double sick : {std::nan(""), HUGE_VAL, -HUGE_VAL, 6e4}) {
    for (Values reference::Problem::* rows : {&reference::Problem::q, &reference::Problem::k,
                                              &reference::Problem::v, &reference::Problem::gate}) {
      reference::Problem broken = p;
      for (int64_t t : {0, 33, 39}) (broken.*rows)[(35 + t) * D + 5] = sick;
      Run run(c, broken);
      expect(run.forward(false) == 0, c.name, "launch", 0);
      const Values got = run.out.values(), wanted = well.out.values();
      const Values kv = run.final_kv.values(), kept = well.final_kv.values();
      int changed = 0;
      for (int64_t i = 0; i < p.items * D; ++i) {
        const int64_t row = i / D;
        if (row < 35 || row >= 75) changed += got[i] != wanted[i];
      }
      for (int64_t i = 0; i < 3 * D * D; ++i) {
        if (i / (D * D) != 1) changed += kv[i] != kept[i];
      }
      expect(changed == 0, c.name, "the others keep their bits", sick);
    }
  }
  expect_no_race(c.name);
}
void check_sick_users() {
  check_sick_user(DType::kBFloat16, 64);
  check_sick_user(DType::kHalf, 64);
}

// Beside a large state one item's share is lost in rounding; that of a chunk is not. What the
// generic kernel saves no kernel reads.
void check_large_state(int64_t D) {
  Case c;
  c.name = "large state D" + std::to_string(D);
  c.D = D;
  c.H = 1;
  c.conv = false;
  c.lengths = {2 * kChunk + 2};
  c.initial = c.final = true;
  reference::Problem p = random_problem(c, 31);
  p.inv_freq.assign(p.inv_freq.size(), 0.0);
  p.v.assign(p.v.size(), 1.0);
  p.kv.assign(p.kv.size(), double(1 << 27));
  Run run(c, p);
  expect(run.forward(true) == 0, c.name, "launch", 0);
  const double off = error_of(run.final_kv.values(), reference::forward(p).kv, D * D, 23);
  expect(off <= 2, c.name, "kv", off);  // half a unit a chunk, and the last
  if (D != 10) return;
  p.sequences[0].length = 2 * kChunk;
  const Values saved = run.saved_kv.values();
  const Values last(saved.end() - D * D, saved.end());
  const double then = error_of(last, reference::forward(p).kv, D * D, 23);
  expect(then <= 2, c.name, "saved kv", then);
}

// The kernels without tensor cores still serve two-byte rows where there are none.
void check_without_tensor_cores() {
  Case c;
  c.name = "without tensor cores";
  c.D = 64;
  c.H = 1;
  c.dtype = DType::kBFloat16;
  c.lengths = {66};
  shim::tensor_cores = false;
  run_case(c, 1);
  shim::tensor_cores = true;
}

// A step at a time is the same as the whole sequence; inactive users stay as they are.
void check_step(int64_t D, DType dtype, int64_t W, bool gate, bool augment) {
  Case c;
  c.name = "step D" + std::to_string(D) + " " + name_of(dtype) + " W" + std::to_string(W);
  c.D = D;
  c.dtype = dtype;
  c.W = W;
  c.gate = gate;
  c.conv = augment;
  c.lengths = {4, 4, 4};
  c.initial = c.final = true;
  c.position = 77;
  const reference::Problem p = random_problem(c, 11);
  const reference::Result expected = reference::forward(p);
  Run run(c, p);
  const int64_t C = p.H * D, size = size_of(dtype), L = run.L;
  const auto active = std::make_unique<bool[]>(p.B);
  for (int64_t b = 0; b < p.B; ++b) active[b] = b != 1;
  std::vector<int64_t> position = p.position;
  for (int64_t t = 0; t < L; ++t) {
    const auto at = [&](const Rows& rows) {
      Rows one = rows;
      if (one.data) one.data = static_cast<unsigned char*>(one.data) + t * rows.item_stride * size;
      return one;
    };
    GatedRelaStepParams s{};
    s.dtype = dtype;
    s.B = p.B;
    s.H = p.H;
    s.D = D;
    s.W = p.W;
    s.eps = p.eps;
    s.q = at(run.params.q);
    s.k = at(run.params.k);
    s.v = at(run.params.v);
    s.gate = at(run.params.gate);
    s.out = at(run.params.out);
    s.inv_freq = p.inv_freq.data();
    s.conv_weight = run.weight.data();
    s.conv_bias = run.bias.data();
    s.state = run.states(run.kv, run.k_sum, run.conv, position.data());
    s.active = active.get();
    expect(launch_gated_rela_step(s, nullptr) == 0, c.name, "launch", 0);
    for (int64_t& x : position) ++x;
  }
  const Values out = run.out.values(), kv = run.kv.values(), conv = run.conv.values();
  const auto part = [](const Values& x, int64_t b, int64_t n) {
    return Values(x.begin() + b * n, x.begin() + (b + 1) * n);
  };
  const int64_t past = p.W - 1;
  for (int64_t b = 0; b < p.B; ++b) {
    const bool moved = active[b];
    const Values rows = moved ? part(expected.out, b, L * C) : Values(L * C, 0.0);
    const double off = error_of(part(out, b, L * C), rows, C, digits_of(dtype));
    expect(off <= (dtype == DType::kDouble ? 64 : row_limit(dtype)), c.name, "out", off);
    const double sums = error_of(part(kv, b, C * D), part(moved ? expected.kv : p.kv, b, C * D),
                                 D * D, digits_of(run.acc));
    expect(sums <= (moved ? 16 : 0), c.name, "kv", sums);
    const double window =
        error_of(part(conv, b, past * C), part(moved ? expected.conv : p.conv, b, past * C), 1, 23);
    expect(window == 0, c.name, "conv window", window);
  }
  expect_no_race(c.name);
}

void check_step() {
  for (int64_t D : {2, 6, 16, 32, 64, 128}) {
    check_step(D, DType::kFloat, 4, true, true);
    check_step(D, DType::kBFloat16, 1, false, true);
  }
  check_step(514, DType::kFloat, 2, true, true);  // a warp a block
  check_step(16, DType::kHalf, 7, true, true);
  check_step(16, DType::kDouble, 4, true, false);
}

}  // namespace

int main(int argc, char** argv) {
  const bool all = argc > 2 && std::string(argv[1]) == "long";
  stop_at_first = argc > 1 && std::string(argv[1]) == "first";
  const int words = stop_at_first ? 2 : 1;
  const std::string only = !all && argc > words ? argv[words] : "";
  verbose = !only.empty();
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  check_reference();
  expect(tensor_core_twins_hold(), "tensor core", "the twins hold", 0);
  const unsigned first = all ? unsigned(std::atoi(argv[2])) : 0;
  const unsigned orders = all || races::watched ? 1 : 3;
  for (unsigned order = first; order < first + orders; ++order) {
    shim::set_order(order == 0   ? shim::Order::kForward
                    : order == 1 ? shim::Order::kReverse
                                 : shim::Order::kShuffled,
                    order);
    for (const Case& c : cases(all)) {
      if (c.name.find(only) != std::string::npos) run_case(c, 1);
    }
    if (std::string("malformed").find(only) != std::string::npos) check_malformed();
    if (std::string("large state").find(only) != std::string::npos) {
      for (int64_t D : {10, 16, 64, 128}) check_large_state(D);
    }
    if (std::string("sick user").find(only) != std::string::npos) check_sick_users();
    if (std::string("without tensor cores").find(only) != std::string::npos) {
      check_without_tensor_cores();
    }
    if (std::string("step").find(only) != std::string::npos) check_step();
  }
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures == 0 ? 0 : 1;
}
