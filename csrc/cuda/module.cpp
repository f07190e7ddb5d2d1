// fastcontrast._CUDA: the table of contents of the CUDA kernels. Functions take addresses, sizes, strides and a stream,
// release the GIL, trust their caller and return the runtime's status, 0 for success. An address of 0 means "absent".
#include <pybind11/pybind11.h>

#include "cuda/contrastive_select.h"
#include "cuda/device.h"
#include "cuda/max_cosine.h"
#include "cuda/two_logit_mix.h"

namespace py = pybind11;
using namespace fastcontrast::cuda;

namespace {

using Address = uintptr_t;

template <typename T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace

PYBIND11_MODULE(_CUDA, m, py::mod_gil_not_used()) {
    m.def("probe", &probe, py::arg("device"), py::call_guard<py::gil_scoped_release>());
    m.def("error_string", &error_string, py::arg("status"));
    m.def("row_splits", &row_splits, py::arg("rows"), py::arg("count"), py::arg("dtype"), py::arg("multiprocessors"));

    py::class_<Cosines>(m, "Cosines")
        .def(py::init([](Address candidates, Address context, Address valid, int64_t b, int64_t k, int64_t t, int64_t d,
                         int64_t candidate_batch, int64_t candidate_row, int64_t context_batch, int64_t context_row,
                         int dtype, int multiprocessors) {
                 Cosines problem{at<void>(candidates), at<void>(context), at<bool>(valid), b,           k,    t, d,
                                 candidate_batch,      candidate_row,     context_batch,   context_row, dtype};
                 problem.plan(multiprocessors);
                 return problem;
             }),
             py::arg("candidates"), py::arg("context"), py::arg("valid"), py::arg("b"), py::arg("k"), py::arg("t"),
             py::arg("d"), py::arg("candidate_batch"), py::arg("candidate_row"), py::arg("context_batch"),
             py::arg("context_row"), py::arg("dtype"), py::arg("multiprocessors"))
        .def_property_readonly("workspace", &Cosines::workspace);
    m.def(
        "max_cosine",
        [](const Cosines& problem, Address workspace, Address values, Address indices, int device, Address stream) {
            py::gil_scoped_release release;
            if (const int status = use_device(device)) return status;
            return max_cosine(problem, at<uint64_t>(workspace), at<float>(values), at<int64_t>(indices),
                              at<void>(stream));
        },
        py::arg("problem"), py::arg("workspace"), py::arg("values"), py::arg("indices"), py::arg("device"),
        py::arg("stream"));
    m.def("candidates_workspace", &candidates_workspace, py::arg("rows"), py::arg("splits"));
    m.def(
        "contrastive_candidates",
        [](Address logits, Address probabilities, Address tokens, Address workspace, int64_t b, int64_t v, int64_t k,
           int64_t stride, int splits, int dtype, int device, Address stream) {
            py::gil_scoped_release release;
            if (const int status = use_device(device)) return status;
            return contrastive_candidates(at<void>(logits), at<float>(probabilities), at<int64_t>(tokens),
                                          at<uint64_t>(workspace), b, v, k, stride, splits, dtype, at<void>(stream));
        },
        py::arg("logits"), py::arg("probabilities"), py::arg("tokens"), py::arg("workspace"), py::arg("b"),
        py::arg("v"), py::arg("k"), py::arg("stride"), py::arg("splits"), py::arg("dtype"), py::arg("device"),
        py::arg("stream"));
    m.def(
        "contrastive_select",
        [](const Cosines& problem, Address probabilities, Address workspace, Address choice, Address score,
           Address degeneration, double alpha, int device, Address stream) {
            py::gil_scoped_release release;
            if (const int status = use_device(device)) return status;
            return contrastive_select(problem, at<float>(probabilities), at<uint64_t>(workspace), at<int64_t>(choice),
                                      at<float>(score), at<float>(degeneration), static_cast<float>(1.0 - alpha),
                                      static_cast<float>(alpha), at<void>(stream));
        },
        py::arg("problem"), py::arg("probabilities"), py::arg("workspace"), py::arg("choice"), py::arg("score"),
        py::arg("degeneration"), py::arg("alpha"), py::arg("device"), py::arg("stream"));
    m.def("mixture_workspace", &mixture_workspace, py::arg("rows"), py::arg("splits"));
    m.def(
        "two_logit_mix",
        [](Address z1, Address z0, Address weight, Address out, Address a, Address divergence, Address workspace,
           int64_t rows, int64_t v, int64_t stride1, int64_t stride0, float keep, float floor, float threshold,
           bool diverge, int dtype, int splits, int device, Address stream) {
            py::gil_scoped_release release;
            if (const int status = use_device(device)) return status;
            const Mixture problem{at<void>(z1),
                                  at<void>(z0),
                                  at<float>(weight),
                                  at<float>(out),
                                  at<float>(a),
                                  at<float>(divergence),
                                  rows,
                                  v,
                                  stride1,
                                  stride0,
                                  keep,
                                  floor,
                                  threshold,
                                  diverge,
                                  dtype,
                                  splits};
            return two_logit_mix(problem, at<float>(workspace), at<void>(stream));
        },
        py::arg("z1"), py::arg("z0"), py::arg("weight"), py::arg("out"), py::arg("a"), py::arg("divergence"),
        py::arg("workspace"), py::arg("rows"), py::arg("v"), py::arg("stride1"), py::arg("stride0"), py::arg("keep"),
        py::arg("floor"), py::arg("threshold"), py::arg("diverge"), py::arg("dtype"), py::arg("splits"),
        py::arg("device"), py::arg("stream"));
}
