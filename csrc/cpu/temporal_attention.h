// A token attends the tokens at its own position in other frames of the clip, and extra keys.
#pragma once

#include "cpu/frames.h"

namespace fastcontrast {

// out like q; lse [frames, H, T], or null.
void temporal_attention(const FrameAttention& c, const View& out, float* lse, int threads);

// dlse [frames, H, T], or null. Everything of the gradients is written. `out` and `lse` are those of frame_attention's
// backward and not looked at: the small softmax is computed again.
void temporal_attention_backward(const FrameAttention& c, const View& out, const View& dout, const FrameGradients& to,
                                 const float* lse, const float* dlse, int threads);

}  // namespace fastcontrast
