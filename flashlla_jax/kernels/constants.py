"""The constants of a kernel in one value: a kernel and its helpers take one argument for all."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Constants:
    """The constants of a kernel; ``passes.py`` says where each comes from.

    Attributes:
        HEADS, KV_HEADS: query heads, and key/value heads.
        D, DV: head dimensions of keys and of values.
        DP, DVP: the same padded to powers of two, 16 at least.
        BM, BN: queries and keys of a tile.
        STAGES, EDGE_STAGES: depth of the software pipeline over whole tiles, and over those that are compared. These
            are few but with a mask: a pipeline of their own costs more registers than it hides time.
        SCALE, QK_SCALE: factor of the logits, in units of log 2 and as it is.
        STEEPNESS: the size of SCALE, if only just positive, so that a hidden key's -inf stays -inf.
        PRECISION: of a float32 product.
        EXACT: it keeps all of float32; so do, then, the differences of large products, see ``tiles.py``.
        UPCAST: tiles are widened to float32 after loading, and keys taken relative to an origin.
        ANCHORED: the keys came relative to their documents' anchors, see ``origin.py``.
        PARTS, FEWEST_PARTS: x is carried in so many parts, each the rounding of what those before it left, and in so
            many if the last does not matter: one, hi and lo, or hi, lo and rest. u has hi, and lo if x has it.
        MOST_CARE: the last passes over a tile are made with so much care at the most. 0: x in the fewest parts. 1: in
            all parts. What ``tiles.with_b0`` adds last comes with the most, so that 2 may differ from 1.
        SPLIT_ALL: the weights of all rows are carried as hi and lo, not only those of the hard ones.
        HARD_BELOW: a row is hard by this measure, see ``tiles.is_hard``; 0: none is.
        LAST_ABOVE: the last part of x is used where it moves some kc.x by more than this.
        CORRECTED_BELOW: u is corrected once in a row where the b_ij keep less than this share of gamma's variance.
        BALANCED_ABOVE: the |x.kbar| above which the a_ij of a row are made to sum to 1, as they are beside the rest.
        FROM_FIRST: every interval starts at key 0.
        IDS: ids are compared inside the intervals.
        MASK: a boolean mask is looked at there, and the tiles visited are listed.
        MASK_B, MASK_N, MASK_T, MASK_S: which axes the mask has; the others are of size 1.
        CUT: one tile of queries of so many may be cut, and the programs of all parts are listed; 0: none, and no list.
        PER_BATCH: intervals, ids and tables are a batch entry's own, else shared.
        PER_HEAD: lists are a head's own, else shared.
        RTOL, HARD_RTOL, ATOL, ENERGY, MAX_ITERS, PRECONDITION, FINISH: how the solve stops, see ``solver.py``.
        DELTA_EPS: added to the denominator of the paper's form.
        QUERY_BM: in the key kernel, the query kernel's BM.
    """

    HEADS: int
    KV_HEADS: int
    D: int
    DV: int
    DP: int
    DVP: int
    BM: int
    BN: int
    STAGES: int
    EDGE_STAGES: int
    SCALE: float
    QK_SCALE: float
    STEEPNESS: float
    PRECISION: str
    EXACT: bool
    UPCAST: bool
    ANCHORED: bool
    PARTS: int
    FEWEST_PARTS: int
    MOST_CARE: int
    SPLIT_ALL: bool
    HARD_BELOW: float
    LAST_ABOVE: float
    CORRECTED_BELOW: float
    BALANCED_ABOVE: float
    FROM_FIRST: bool
    IDS: bool
    MASK: bool
    MASK_B: bool
    MASK_N: bool
    MASK_T: bool
    MASK_S: bool
    CUT: int
    PER_BATCH: bool
    PER_HEAD: bool
    RTOL: float
    HARD_RTOL: float
    ATOL: float
    ENERGY: bool
    MAX_ITERS: int
    PRECONDITION: bool
    FINISH: bool
    DELTA_EPS: float
    QUERY_BM: int
