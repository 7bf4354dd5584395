// A number and its derivative with respect to one input: exact gradients of plain loops, without a graph.
#pragma once

#include <cmath>
#include <numbers>
#include <vector>

namespace moelab::oracle {

struct Dual {
  double v = 0;
  double d = 0;
  Dual() = default;
  Dual(double value) : v(value) {}  // NOLINT: constants mix freely
  Dual(double value, double derivative) : v(value), d(derivative) {}
};

using Vec = std::vector<Dual>;
using Mat = std::vector<Vec>;

inline Dual operator+(Dual a, Dual b) { return {a.v + b.v, a.d + b.d}; }
inline Dual operator-(Dual a, Dual b) { return {a.v - b.v, a.d - b.d}; }
inline Dual operator*(Dual a, Dual b) { return {a.v * b.v, a.d * b.v + a.v * b.d}; }
inline Dual operator/(Dual a, Dual b) { return {a.v / b.v, (a.d - a.v / b.v * b.d) / b.v}; }
inline Dual& operator+=(Dual& a, Dual b) { return a = a + b; }
inline Dual exp(Dual a) { return {std::exp(a.v), std::exp(a.v) * a.d}; }
inline Dual log(Dual a) { return {std::log(a.v), a.d / a.v}; }
inline Dual tanh(Dual a) { return {std::tanh(a.v), (1 - std::tanh(a.v) * std::tanh(a.v)) * a.d}; }
inline Dual square_root(Dual a) { return {std::sqrt(a.v), a.d / (2 * std::sqrt(a.v))}; }
inline Dual sigmoid(Dual a) { return Dual(1) / (Dual(1) + exp(Dual(-1) * a)); }
inline Dual softplus(Dual a) { return log(Dual(1) + exp(a)); }
inline Dual erf(Dual a) { return {std::erf(a.v), 2 / std::sqrt(std::numbers::pi) * std::exp(-a.v * a.v) * a.d}; }
inline Dual normal_cdf(Dual a) { return Dual(0.5) * (Dual(1) + erf(a / Dual(std::numbers::sqrt2))); }

}  // namespace moelab::oracle
