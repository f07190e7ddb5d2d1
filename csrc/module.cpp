// fastcontrast._C: the table of contents of the native core. Functions take addresses, sizes and strides, release the
// GIL and trust their caller; shapes and dtypes are checked in fastcontrast/ops. An address of 0 means "absent".
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/memory.h"
#include "cpu/contrastive_select.h"
#include "cpu/few_rows.h"
#include "cpu/frame_attention.h"
#include "cpu/linear_kl.h"
#include "cpu/llama_layer.h"
#include "cpu/max_cosine.h"
#include "cpu/maxsim.h"
#include "cpu/sibling_attention.h"
#include "cpu/similarity_cross_entropy.h"
#include "cpu/similarity_lse.h"
#include "cpu/similarity_softplus.h"
#include "cpu/similarity_topk.h"
#include "cpu/temporal_attention.h"
#include "cpu/triplet_distances.h"
#include "cpu/two_logit_mix.h"

namespace py = pybind11;
using namespace fastcontrast;

namespace {

using Address = uintptr_t;

template <typename T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

Cosines cosines(Address candidates, Address context, Address valid, int64_t b, int64_t k, int64_t t, int64_t d,
                int64_t candidate_batch, int64_t candidate_row, int64_t context_batch, int64_t context_row, int kind) {
    return {at<void>(candidates), at<void>(context), at<bool>(valid),        b, k, t, d, candidate_batch, candidate_row,
            context_batch,        context_row,       static_cast<Kind>(kind)};
}

Triplets triplets(Address target, Address positive, Address negative, const std::array<int64_t, 5>& sizes, int kind) {
    return {at<void>(target), at<void>(positive), at<void>(negative),     sizes[0], sizes[1], sizes[2],
            sizes[3],         sizes[4],           static_cast<Kind>(kind)};
}

// The gradient of maxsim to one side, from the tokens of the other.
void def_maxsim_gradient(py::module_& m, const char* name, decltype(maxsim_queries)* side) {
    m.def(
        name,
        [side](Address winners, bool wide, Address gradient, Address tokens, Address out,
               const std::array<int64_t, 5>& sizes, const std::array<int64_t, 2>& strides, int kind, int threads) {
            py::gil_scoped_release release;
            const auto [b, tq, c, td, d] = sizes;
            side({{at<void>(winners), b * tq, wide}, at<float>(gradient), b, tq, c, td, d},
                 {at<void>(tokens), strides[0], strides[1], static_cast<Kind>(kind)}, at<float>(out), threads);
        },
        py::arg("winners"), py::arg("wide"), py::arg("gradient"), py::arg("tokens"), py::arg("out"), py::arg("sizes"),
        py::arg("strides"), py::arg("kind"), py::arg("threads"));
}

// Address and five strides of each of N tensors.
template <size_t N>
using Views = std::array<int64_t, 6 * N>;

template <size_t N>
std::array<View, N> views(const Views<N>& x) {
    std::array<View, N> found;
    for (size_t i = 0; i < N; ++i)
        found[i] = {at<char>(static_cast<Address>(x[6 * i])), x[6 * i + 1], x[6 * i + 2], x[6 * i + 3], x[6 * i + 4]};
    return found;
}

// An attention across frames and its backward; views of `out`, of `out`, `dout` and the gradients.
void def_attention(py::module_& m, const std::string& name, decltype(frame_attention)* forward,
                   decltype(frame_attention_backward)* backward) {
    m.def(
        name.c_str(),
        [forward](const FrameAttention& problem, const Views<1>& out, Address lse, int threads) {
            py::gil_scoped_release release;
            forward(problem, views<1>(out)[0], at<float>(lse), threads);
        },
        py::arg("problem"), py::arg("out"), py::arg("lse"), py::arg("threads"));
    m.def((name + "_backward").c_str(),
          [backward](const FrameAttention& problem, const Views<7>& tensors, Address lse, Address dlse, int threads) {
              py::gil_scoped_release release;
              const auto x = views<7>(tensors);
              backward(problem, x[0], x[1], {x[2], x[3], x[4], x[5], x[6]}, at<float>(lse), at<float>(dlse), threads);
          },
          py::arg("problem"), py::arg("tensors"), py::arg("lse"), py::arg("dlse"), py::arg("threads"));
}

// The product of a few rows with a matrix of weights, whichever way the matrix lies.
void def_product(py::module_& m, const char* name, decltype(few_rows)* product) {
    m.def(
        name,
        [product](Address x, Address weight, Address bias, Address out, int64_t m, int64_t n, int64_t d, int threads) {
            py::gil_scoped_release release;
            product(at<float>(x), at<float>(weight), at<float>(bias), at<float>(out), m, n, d, threads);
        },
        py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("out"), py::arg("m"), py::arg("n"), py::arg("d"),
        py::arg("threads"));
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
    m.def("huge_pages", &huge_pages, py::arg("address"), py::arg("bytes"));

    py::class_<Logits>(m, "Logits")
        .def(py::init([](float scale, Address key_bias, Address query_ids, Address key_ids, Address guide_limit,
                         Address positives) {
                 return Logits{scale,
                               at<float>(key_bias),
                               at<int64_t>(query_ids),
                               at<int64_t>(key_ids),
                               at<float>(guide_limit),
                               at<int64_t>(positives)};
             }),
             py::arg("scale"), py::arg("key_bias") = 0, py::arg("query_ids") = 0, py::arg("key_ids") = 0,
             py::arg("guide_limit") = 0, py::arg("positives") = 0);
    py::class_<Tile>(m, "Tile").def(
        py::init([](Address data, int64_t i0, int64_t rows, int64_t j0, int64_t columns, Address guide) {
            return Tile{at<float>(data), i0, rows, j0, columns, at<float>(guide)};
        }),
        py::arg("data"), py::arg("i0"), py::arg("rows"), py::arg("j0"), py::arg("columns"), py::arg("guide") = 0);
    py::class_<Running>(m, "Running")
        .def(py::init<int64_t, bool>(), py::arg("count"), py::arg("best") = false)
        .def(
            "finish",
            [](const Running& running, Address high, Address low, Address best, Address sum) {
                py::gil_scoped_release release;
                running.finish(at<float>(high), at<float>(low), at<int64_t>(best), at<float>(sum));
            },
            py::arg("high"), py::arg("low"), py::arg("best") = 0, py::arg("sum") = 0);
    py::class_<Softmax>(m, "Softmax")
        .def(py::init([](Address gradient, Address high, Address low) {
                 return Softmax{at<float>(gradient), at<float>(high), at<float>(low)};
             }),
             py::arg("gradient") = 0, py::arg("high") = 0, py::arg("low") = 0);
    m.def(
        "lse",
        [](const Logits& logits, const Tile& tile, Running* rows, Running* columns, Address own, Address rescale,
           bool without_own, int threads) {
            py::gil_scoped_release release;
            lse(logits, tile, rows ? rows->online() : Online{}, columns ? columns->online() : Online{}, at<float>(own),
                at<float>(rescale), without_own, threads);
        },
        py::arg("logits"), py::arg("tile"), py::arg("rows").none(true), py::arg("columns").none(true),
        py::arg("own") = 0, py::arg("rescale") = 0, py::arg("without_own") = false, py::arg("threads") = 1);
    m.def(
        "weights",
        [](const Logits& logits, const Tile& target, Address source, const Softmax& rows, const Softmax& columns,
           Address own_gradient, float factor, int threads) {
            py::gil_scoped_release release;
            weights(logits, target, at<float>(source), rows, columns, at<float>(own_gradient), factor, threads);
        },
        py::arg("logits"), py::arg("target"), py::arg("source"), py::arg("rows"), py::arg("columns"),
        py::arg("own_gradient") = 0, py::arg("factor") = 1.0f, py::arg("threads") = 1);
    py::class_<Targets>(m, "Targets")
        .def(py::init([](Address query_labels, Address key_labels, Address dense, float high, float low) {
                 return Targets{at<int64_t>(query_labels), at<int64_t>(key_labels), at<float>(dense), high, low};
             }),
             py::arg("query_labels"), py::arg("key_labels"), py::arg("dense"), py::arg("high"), py::arg("low"));
    m.def(
        "softplus",
        [](const Logits& logits, const Tile& tile, const Targets& targets, Address sums, Address gradient,
           Address gradient_sums, float factor, int threads) {
            py::gil_scoped_release release;
            softplus(logits, tile, targets, at<float>(sums), at<float>(gradient), at<float>(gradient_sums), factor,
                     threads);
        },
        py::arg("logits"), py::arg("tile"), py::arg("targets"), py::arg("sums"), py::arg("gradient") = 0,
        py::arg("gradient_sums") = 0, py::arg("factor") = 1.0f, py::arg("threads") = 1);
    py::class_<Best>(m, "Best")
        .def(py::init<int64_t, int64_t, int64_t, bool>(), py::arg("rows"), py::arg("k"), py::arg("columns"),
             py::arg("largest"))
        .def(
            "fold",
            [](Best& best, const Tile& tile, Address query_ids, Address key_ids, Address limit, int threads) {
                py::gil_scoped_release release;
                best.fold(tile, {at<int64_t>(query_ids), at<int64_t>(key_ids), at<float>(limit)}, threads);
            },
            py::arg("tile"), py::arg("query_ids"), py::arg("key_ids"), py::arg("limit"), py::arg("threads"))
        .def(
            "finish",
            [](Best& best, Address values, Address indices, int64_t rows, int threads) {
                py::gil_scoped_release release;
                best.finish(at<float>(values), at<int64_t>(indices), rows, threads);
            },
            py::arg("values"), py::arg("indices"), py::arg("rows"), py::arg("threads"));
    m.def(
        "kl_sums",
        [](const Tile& student, Address teacher, const Softmax& p, const Softmax& t, Address forward, Address reverse,
           Address entropy, int threads) {
            py::gil_scoped_release release;
            kl_sums(student, at<float>(teacher), p, t, {at<float>(forward), at<float>(reverse), at<float>(entropy)},
                    threads);
        },
        py::arg("student"), py::arg("teacher"), py::arg("p"), py::arg("t"), py::arg("forward"), py::arg("reverse"),
        py::arg("entropy"), py::arg("threads"));
    m.def(
        "kl_weights",
        [](const Tile& student, Address teacher, const Softmax& p, const Softmax& t, float forward, float reverse,
           Address forward_sums, Address reverse_sums, Address entropy, float factor, int threads) {
            py::gil_scoped_release release;
            kl_weights(student, at<float>(teacher), p, t, forward, reverse,
                       {at<float>(forward_sums), at<float>(reverse_sums), at<float>(entropy)}, factor, threads);
        },
        py::arg("student"), py::arg("teacher"), py::arg("p"), py::arg("t"), py::arg("forward"), py::arg("reverse"),
        py::arg("forward_sums"), py::arg("reverse_sums"), py::arg("entropy"), py::arg("factor"), py::arg("threads"));
    m.def(
        "dot",
        [](Address a, Address b, int64_t count) {
            py::gil_scoped_release release;
            return dot(at<float>(a), at<float>(b), count);
        },
        py::arg("a"), py::arg("b"), py::arg("count"));
    m.def(
        "loss_sum",
        [](Address own, Address rows, Address rows_low, Address columns, Address columns_low, int64_t count) {
            py::gil_scoped_release release;
            return loss_sum(at<float>(own), at<float>(rows), at<float>(rows_low), at<float>(columns),
                            at<float>(columns_low), count);
        },
        py::arg("own"), py::arg("rows"), py::arg("rows_low"), py::arg("columns"), py::arg("columns_low"),
        py::arg("count"));
    m.def(
        "small_loss",
        [](const Logits& problem, Address query_labels, Address key_labels, Address logits, int64_t rows,
           int64_t columns, bool both, Address state, int threads) {
            py::gil_scoped_release release;
            return small_loss(problem, {at<int64_t>(query_labels), at<int64_t>(key_labels)}, at<float>(logits), rows,
                              columns, both, at<float>(state), threads);
        },
        py::arg("problem"), py::arg("query_labels"), py::arg("key_labels"), py::arg("logits"), py::arg("rows"),
        py::arg("columns"), py::arg("both"), py::arg("state"), py::arg("threads"));
    m.def(
        "small_gradient",
        [](const Logits& problem, Address query_labels, Address key_labels, Address logits, Address target,
           int64_t rows, int64_t columns, bool both, bool symmetric, Address state, float gradient, int threads) {
            py::gil_scoped_release release;
            return small_gradient(problem, {at<int64_t>(query_labels), at<int64_t>(key_labels)}, at<float>(logits),
                                  at<float>(target), rows, columns, both, symmetric, at<float>(state), gradient,
                                  threads);
        },
        py::arg("problem"), py::arg("query_labels"), py::arg("key_labels"), py::arg("logits"), py::arg("target"),
        py::arg("rows"), py::arg("columns"), py::arg("both"), py::arg("symmetric"), py::arg("state"),
        py::arg("gradient"), py::arg("threads"));
    m.def(
        "max_cosine",
        [](Address candidates, Address context, Address valid, Address values, Address indices, int64_t b, int64_t k,
           int64_t t, int64_t d, int64_t candidate_batch, int64_t candidate_row, int64_t context_batch,
           int64_t context_row, int kind, int threads) {
            py::gil_scoped_release release;
            max_cosine(cosines(candidates, context, valid, b, k, t, d, candidate_batch, candidate_row, context_batch,
                               context_row, kind),
                       at<float>(values), at<int64_t>(indices), threads);
        },
        py::arg("candidates"), py::arg("context"), py::arg("valid"), py::arg("values"), py::arg("indices"),
        py::arg("b"), py::arg("k"), py::arg("t"), py::arg("d"), py::arg("candidate_batch"), py::arg("candidate_row"),
        py::arg("context_batch"), py::arg("context_row"), py::arg("kind"), py::arg("threads"));
    m.def(
        "maxsim_fold",
        [](Address scores, Address query_mask, Address document_mask, Address sums, Address winners,
           const std::array<int64_t, 4>& sizes, const std::array<int64_t, 2>& strides, bool zero, bool wide,
           int threads) {
            py::gil_scoped_release release;
            maxsim_fold({at<float>(scores), sizes[0], sizes[1], sizes[2], sizes[3], at<bool>(query_mask),
                         at<bool>(document_mask), zero},
                        at<float>(sums), strides[0], {at<void>(winners), strides[1], wide}, threads);
        },
        py::arg("scores"), py::arg("query_mask"), py::arg("document_mask"), py::arg("sums"), py::arg("winners"),
        py::arg("sizes"), py::arg("strides"), py::arg("zero"), py::arg("wide"), py::arg("threads"));
    def_maxsim_gradient(m, "maxsim_queries", &maxsim_queries);
    def_maxsim_gradient(m, "maxsim_documents", &maxsim_documents);
    m.def(
        "triplet_distances",
        [](Address target, Address positive, Address negative, Address distances, const std::array<int64_t, 5>& sizes,
           int kind, int threads) {
            py::gil_scoped_release release;
            triplet_distances(triplets(target, positive, negative, sizes, kind), at<float>(distances), threads);
        },
        py::arg("target"), py::arg("positive"), py::arg("negative"), py::arg("distances"), py::arg("sizes"),
        py::arg("kind"), py::arg("threads"));
    m.def(
        "triplet_distances_backward",
        [](Address target, Address positive, Address negative, Address gradients, Address dtarget, Address dpositive,
           Address dnegative, const std::array<int64_t, 5>& sizes, int kind, int threads) {
            py::gil_scoped_release release;
            triplet_distances_backward(triplets(target, positive, negative, sizes, kind), at<float>(gradients),
                                       at<void>(dtarget), at<void>(dpositive), at<void>(dnegative), threads);
        },
        py::arg("target"), py::arg("positive"), py::arg("negative"), py::arg("gradients"), py::arg("dtarget"),
        py::arg("dpositive"), py::arg("dnegative"), py::arg("sizes"), py::arg("kind"), py::arg("threads"));
    m.def(
        "contrastive_candidates",
        [](Address logits, Address probabilities, Address tokens, int64_t rows, int64_t vocabulary, int64_t k,
           int64_t stride, int kind, int threads) {
            py::gil_scoped_release release;
            contrastive_candidates(at<void>(logits), static_cast<Kind>(kind), rows, vocabulary, stride, k,
                                   at<float>(probabilities), at<int64_t>(tokens), threads);
        },
        py::arg("logits"), py::arg("probabilities"), py::arg("tokens"), py::arg("rows"), py::arg("vocabulary"),
        py::arg("k"), py::arg("stride"), py::arg("kind"), py::arg("threads"));
    m.def(
        "contrastive_select",
        [](Address probabilities, Address candidates, Address context, Address valid, Address choice, Address score,
           Address degeneration, Address nearest, int64_t b, int64_t k, int64_t t, int64_t d, int64_t candidate_batch,
           int64_t candidate_row, int64_t context_batch, int64_t context_row, float alpha, int kind, int threads) {
            py::gil_scoped_release release;
            contrastive_select(at<float>(probabilities),
                               cosines(candidates, context, valid, b, k, t, d, candidate_batch, candidate_row,
                                       context_batch, context_row, kind),
                               alpha, at<int64_t>(choice), at<float>(score), at<float>(degeneration),
                               at<int64_t>(nearest), threads);
        },
        py::arg("probabilities"), py::arg("candidates"), py::arg("context"), py::arg("valid"), py::arg("choice"),
        py::arg("score"), py::arg("degeneration"), py::arg("nearest"), py::arg("b"), py::arg("k"), py::arg("t"),
        py::arg("d"), py::arg("candidate_batch"), py::arg("candidate_row"), py::arg("context_batch"),
        py::arg("context_row"), py::arg("alpha"), py::arg("kind"), py::arg("threads"));
    def_product(m, "few_rows", &few_rows);
    def_product(m, "few_rows_by_input", &few_rows_by_input);
    py::class_<LlamaLayer>(m, "LlamaLayer", py::dynamic_attr())
        .def(py::init([](std::array<std::array<Address, 2>, 7> linears, std::array<Address, 2> norms,
                         std::array<float, 2> eps, float scale, std::array<int64_t, 5> sizes) {
                 LlamaLayer layer;
                 Linear* parts[] = {&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down};
                 for (int i = 0; i < 7; ++i) *parts[i] = {at<float>(linears[i][0]), at<float>(linears[i][1])};
                 layer.attention_norm = at<float>(norms[0]), layer.mlp_norm = at<float>(norms[1]);
                 layer.attention_eps = eps[0], layer.mlp_eps = eps[1], layer.scale = scale;
                 layer.hidden = sizes[0], layer.inner = sizes[1];
                 layer.heads = sizes[2], layer.groups = sizes[3], layer.width = sizes[4];
                 return layer;
             }),
             py::arg("linears"), py::arg("norms"), py::arg("eps"), py::arg("scale"), py::arg("sizes"))
        .def(
            "run",
            [](const LlamaLayer& layer, Address x, Address cos, Address sin, Address keys, Address values, Address mask,
               Address out, std::array<int64_t, 3> sizes, std::array<int64_t, 5> strides, int threads) {
                py::gil_scoped_release release;
                llama_layer(
                    layer,
                    {at<float>(x), at<float>(cos), at<float>(sin), at<float>(keys), at<float>(values), at<float>(mask),
                     sizes[0], sizes[1], sizes[2], strides[0], strides[1], strides[2], strides[3], strides[4]},
                    at<float>(out), threads);
            },
            py::arg("x"), py::arg("cos"), py::arg("sin"), py::arg("keys"), py::arg("values"), py::arg("mask"),
            py::arg("out"), py::arg("sizes"), py::arg("strides"), py::arg("threads"));
    m.attr("MOST_QUERIES") = kMostQueries;
    m.def(
        "sibling_attention",
        [](Address q, Address k, Address v, Address mask, Address out, std::array<int64_t, 7> sizes,
           std::array<int64_t, 11> strides, float scale, int threads) {
            py::gil_scoped_release release;
            const auto [b, groups, heads, siblings, t, d, dv] = sizes;
            const auto [qb, qh, qr, kb, kg, kr, vb, vg, vr, mb, mr] = strides;
            sibling_attention({at<float>(q),
                               at<float>(k),
                               at<float>(v),
                               at<float>(mask),
                               b,
                               groups,
                               heads,
                               siblings,
                               t,
                               d,
                               dv,
                               qb,
                               qh,
                               qr,
                               kb,
                               kg,
                               kr,
                               vb,
                               vg,
                               vr,
                               mb,
                               mr,
                               scale},
                              at<float>(out), threads);
        },
        py::arg("q"), py::arg("k"), py::arg("v"), py::arg("mask"), py::arg("out"), py::arg("sizes"), py::arg("strides"),
        py::arg("scale"), py::arg("threads"));
    m.def(
        "two_logit_mix",
        [](Address logits, Address contrast, Address given, Address out, Address weight, Address divergence,
           int64_t rows, int64_t vocabulary, int64_t stride, int64_t contrast_stride, float keep, float floor,
           float threshold, bool diverge, int kind, int threads) {
            py::gil_scoped_release release;
            two_logit_mix({at<void>(logits), at<void>(contrast), rows, vocabulary, stride, contrast_stride,
                           static_cast<Kind>(kind)},
                          {at<float>(given), keep, floor, threshold, diverge}, at<float>(out), at<float>(weight),
                          at<float>(divergence), threads);
        },
        py::arg("logits"), py::arg("contrast"), py::arg("given"), py::arg("out"), py::arg("weight"),
        py::arg("divergence"), py::arg("rows"), py::arg("vocabulary"), py::arg("stride"), py::arg("contrast_stride"),
        py::arg("keep"), py::arg("floor"), py::arg("threshold"), py::arg("diverge"), py::arg("kind"),
        py::arg("threads"));

    py::class_<FrameAttention>(m, "FrameAttention")
        .def(py::init([](const Views<5>& tensors, const std::array<int64_t, 8>& n, Address count, int64_t count_batch,
                         Address valid, Address starts, bool shared, float scale, int kind) {
                 const auto x = views<5>(tensors);
                 return FrameAttention{x[0],
                                       x[1],
                                       x[2],
                                       x[3],
                                       x[4],
                                       n[0],
                                       n[1],
                                       n[2],
                                       n[3],
                                       n[4],
                                       n[5],
                                       n[6],
                                       n[7],
                                       at<int32_t>(count),
                                       count_batch,
                                       at<bool>(valid),
                                       at<int32_t>(starts),
                                       shared,
                                       scale,
                                       static_cast<Kind>(kind)};
             }),
             py::arg("tensors"), py::arg("sizes"), py::arg("count"), py::arg("count_batch"), py::arg("valid"),
             py::arg("starts"), py::arg("shared"), py::arg("scale"), py::arg("kind"));
    def_attention(m, "frame_attention", &frame_attention, &frame_attention_backward);
    def_attention(m, "temporal_attention", &temporal_attention, &temporal_attention_backward);
}
