// Dot products of two gradients with each other and with themselves.
#pragma once

#include "math/platform.h"

namespace mmbal {

// In float64, where the product of two narrower numbers is exact, and out of range for none.
struct Dots {
  double first;   // of the first gradient with itself
  double both;    // of the two
  double second;  // of the second with itself
};

namespace {

MMBAL_HD void add_products(double x, double y, Dots* sum) {
  sum->first += x * x;
  sum->both += x * y;
  sum->second += y * y;
}

MMBAL_HD void add(const Dots& part, Dots* sum) {
  sum->first += part.first;
  sum->both += part.both;
  sum->second += part.second;
}

}  // namespace
}  // namespace mmbal
