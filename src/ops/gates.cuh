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
    GateFactors factors = {0.0f, 0.0f, up, 1.0f};
    if (kind == GATE_RELU) {
        factors.gate = fmaxf(gate, 0.0f);
        factors.dgate = gate > 0.0f ? 1.0f : 0.0f;
        return factors;
    }
    // The others are z sigmoid(u): u = z, u = 1.702 z, or (as half z (1 + tanh w) is z sigmoid(2 w)) two terms of a series.
    float z = gate, u = gate, du = 1.0f;
    if (kind == GATE_GELU_TANH) {
        const float outer = 1.5957692f, cube = 0.044715f;
        u = outer * z * (1.0f + cube * z * z);
        du = outer * (1.0f + 3.0f * cube * z * z);
    } else if (kind == GATE_CLAMPED) {
        z = fminf(gate, limit);
        du = 1.702f;
        u = du * z;
        factors.up = (up < -limit ? -limit : up > limit ? limit : up) + 1.0f;
        factors.dup = fabsf(up) <= limit ? 1.0f : 0.0f;
    }
    const float s = sigmoid(u), slope = s * (1.0f + z * du * (1.0f - s));
    factors.gate = z * s;
    factors.dgate = kind == GATE_CLAMPED && gate > limit ? 0.0f : slope;
    return factors;
}
