// The gates of feed-forwards: what ops/glu/cpu.rs makes of one gate and one up, in f32.
#pragma once

#include "kernel.cuh"

// The numbers of Gate::for_kernel.
enum GateKind { GATE_SILU = 0, GATE_GELU_TANH = 1, GATE_RELU = 2, GATE_CLAMPED = 3 };

// The result is gate * up. Its derivative by what `gate` was made of is up * dgate, by what `up` was made of gate * dup.
struct GateFactors {
    float gate, dgate, up, dup;
};

__device__ inline float sigmoid(float z) { return 1.0f / (1.0f + expf(-z)); }

// `limit` is read by GATE_CLAMPED only. What a caller does not use costs nothing.
__device__ inline GateFactors gate_factors(int kind, float limit, float gate, float up) {
    if (kind == GATE_SILU) {
        const float s = sigmoid(gate);
        return {gate * s, s * (1.0f + gate * (1.0f - s)), up, 1.0f};
    }
    if (kind == GATE_GELU_TANH) { // half z (1 + tanh u) is z sigmoid(2 u)
        const float outer = 1.5957692f, cube = 0.044715f;
        const float s = sigmoid(outer * gate * (1.0f + cube * gate * gate));
        const float slope = outer * (1.0f + 3.0f * cube * gate * gate);
        return {gate * s, s * (1.0f + gate * slope * (1.0f - s)), up, 1.0f};
    }
    if (kind == GATE_RELU) return {fmaxf(gate, 0.0f), gate > 0.0f ? 1.0f : 0.0f, up, 1.0f};
    const float steepness = 1.702f;
    const float low = fminf(gate, limit);
    const float s = sigmoid(steepness * low);
    const float slope = s * (1.0f + steepness * low * (1.0f - s));
    const float between = up < -limit ? -limit : (up > limit ? limit : up);
    return {low * s, gate <= limit ? slope : 0.0f, between + 1.0f, fabsf(up) <= limit ? 1.0f : 0.0f};
}
