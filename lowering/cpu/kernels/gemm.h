// The micro-GEMM computes C [rows, columns] (+)= A [rows, panels * steps] x B, in words.
//
// A          is row-major with `lda` words per row; one word is broadcast at a time.
// B          is `num_panels` panels, each [steps, ldb] words. The reduction goes on from panel to panel,
//            so that a strip's P x V reads and writes its accumulators once.
// C          is row-major floats, `ldc` per row.
// row_scale  multiplies, with ACCUMULATE, row r of C by row_scale[r] before the sum.
// bounds     tells, per panel, which keys any of some rows sees, or is null. Q x K^T leaves out other
//            columns (C keeps what it had there), P x V leaves out other steps of the reduction.
// prefetch   points, with FETCH, per panel of B to memory that is read soon. The index chooses which
//            memory that is, so no hardware can foresee it: each step of the product fetches FETCH
//            bytes of it.
#pragma once

#include "spec.h"

#include GEMM_HEADER
