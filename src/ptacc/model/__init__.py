"""Operations on an `nn.Module`: weights, averages, selection of submodules, patches."""
