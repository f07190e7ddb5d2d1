// Every token of a frame attends all tokens of the frames that a count matrix names, and extra keys.
#pragma once

#include "cpu/frames.h"

namespace fastcontrast {

// out like q; lse [frames, H, T], or null.
void frame_attention(const FrameAttention& c, const View& out, float* lse, int threads);

// dlse [frames, H, T], or null. Everything of the gradients is written.
void frame_attention_backward(const FrameAttention& c, const View& out, const View& dout, const FrameGradients& to,
                              const float* lse, const float* dlse, int threads);

}  // namespace fastcontrast
