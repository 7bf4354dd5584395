// Blocks in a row with named sites: what every model of blocks shares between its input and its output.
#pragma once

#include "core/model/settings.h"

namespace moelab {

class Backbone : public Model {
 public:
  std::vector<Site*> sites() const override;
  std::vector<std::string> training_sees_future() const override;
  int64_t active_parameters() const override;
  std::vector<NamedTensor> optimised() const override;

  // Adds the adapters of every block to the weights that they stand on. The adapters stay: what is left to use is the base.
  void fold_adapters(const FoldedExperts& experts) const;
  bool has_adapters() const;

 protected:
  // Where blocks carry adapters, everything else stands still: called by models when all their parameters are there.
  void freeze_base() const;

  // Registers them as "layers.0", "layers.1", …
  void add_blocks(const std::vector<BlockSettings>& settings);
  int64_t blocks() const { return static_cast<int64_t>(blocks_.size()); }

  // x_BLD through all blocks, and what each site decided. `state` goes on from earlier calls, and is null elsewhere.
  Tensor through_blocks(Tensor x_BLD, const std::shared_ptr<const BatchRows>& rows, const StepContext& context,
                        std::vector<SiteResult>& sites, DecodeState* state = nullptr) const;

  double block_flops_per_row(int64_t context) const;  // Σ over the blocks

 private:
  std::vector<std::shared_ptr<Block>> blocks_;
};

}  // namespace moelab
