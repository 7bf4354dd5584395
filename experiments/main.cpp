// The program. Everything it can do is a command of experiments/cli.h.
#include <cstdio>

int main() {
  std::puts("moelab " MOELAB_VERSION);
  return 0;
}
