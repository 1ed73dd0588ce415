/*
 * Two events of one batch handler, under service/firstclaim/inbox/lanes.py and batch_*.py: claimed, dispatched together
 * or alone, by one process or several.
 *
 * `process` claims events, as deliveries or recovery bring them, and runs them; each of its steps is atomic and is one
 * statement to Postgres. `init` is everything else: the server side of Postgres, time. What claim.pml has shown for one
 * event is not shown again: README.md says what is left out, and what each mutant (M_...) takes out.
 *
 * Redis is not modelled: any request for a lock may be granted, refused or not answered, because a lock may be lost at
 * any moment. A marker stays: once it may have been written, any delivery may be answered 2xx.
 */

#ifndef PROCESSES
#define PROCESSES 2 /* three at most */
#endif
#ifndef ATTEMPTS
#define ATTEMPTS 3 /* no take-over beyond this attempt while faults last */
#endif

/* ---- the invariants: never true themselves, so that pan names the one that an assertion is about --------- */

bool B1_one_effect_if_completed_else_none = false;
bool B2_one_handler_at_work_for_each_event = false;
bool B3_a_2xx_and_a_marker_have_a_row = false;
bool B4_processed_is_completed = false;
bool B5_charged_for_a_run_of_its_own = false;
bool B6_what_was_abandoned_goes_alone = false;
bool B7_run_under_the_claim_that_the_row_shows = false;
bool B9_what_has_failed_goes_with_its_like = false;

#define CHECK(name, condition) assert(name || (condition))

/* ---- Postgres: two rows, their locks, the handlers' transactions ---------------------------------------- */

#define ABSENT 0
#define PENDING 1          /* or failed */
#define PROCESSING 2
#define COMPLETED 3
#define DEAD 4

byte row[2];
byte attempt[2];
bit failed[2];             /* last_error: of a failure of its own */
bit told[2];               /* last_error: its batch has failed, so it goes alone */
bit abandoned[2];          /* abandoned > 0 */
bit given_up[2];           /* abandoned since the attempt was claimed */
byte row_lock[2];          /* the process whose handler's transaction has it; 0: free */

#define NONE 0             /* no transaction, or the server has ended it */
#define OPEN 1             /* begun, and the handler is at work in it */
#define LEFT 2             /* begun, and its client is gone */
#define SENT 3             /* marked, COMMIT sent, the connection lost: may yet commit, or not */
byte transaction[4];
byte in_it[4];             /* the events that its handler was called with, a bit each */

/* ---- ghosts; and the claims that the processes know of ---------------------------------------------------- */

byte effects[2];           /* commits of a handler's SQL */
byte claims[8];            /* the attempt that a process has won; 0: none */
bit calm = 0;              /* no more faults, and no more deliveries */
bit poison = 0;            /* the handler always raises when it gets event 0; until faults stop, it may anyway */

#define CLAIM(e) claims[2 * me + (e)]
#define HAS(events, e) (((events) >> (e)) & 1)
#define FIRST(events) (HAS(events, 0) -> 0 : 1)
#define TAKE_AWAY(events, e) events = events & (3 - (1 << (e)))
#define BATCH 3

#define SETTLED(e) (row[e] == COMPLETED || row[e] == DEAD)
#define AT_WORK(who, e) ((transaction[who] == OPEN || transaction[who] == SENT) && HAS(in_it[who], e))
#define TAKEABLE(e) (row[e] == PENDING && row_lock[e] == 0 && (calm || attempt[e] < ATTEMPTS))
#define GUARDED(e) (row[e] == PROCESSING && attempt[e] == CLAIM(e))
#ifdef M_HOLD_BY_ID_ALONE
#define HOLDABLE(e) (HAS(events, e) && row[e] == PROCESSING && row_lock[e] == 0)
#else
#define HOLDABLE(e) (HAS(events, e) && GUARDED(e) && row_lock[e] == 0)
#endif
#define CAN_TAKE_BACK(e) ((row[e] == PENDING || row[e] == DEAD) && given_up[e] && attempt[e] == CLAIM(e))
#define CAN_MARK(e) (!HAS(in_it[me], e) || (GUARDED(e) && (row_lock[e] == 0 || row_lock[e] == me)))
#ifdef FAIR
#define RAISES (poison && HAS(in_it[me], 0))
#else
#define RAISES false
#endif

#ifdef M_ABANDONED_ENTERS_A_BATCH
#define GOES_ALONE(e) told[e]
#else
#define GOES_ALONE(e) (told[e] || abandoned[e])
#endif

#ifdef M_FAILED_AMONG_FRESH
#define ALIKE true
#else
#define ALIKE (again == 0 || again == BATCH)
#endif

inline end_transaction(who) {
    transaction[who] = NONE;
    in_it[who] = 0;
    if
    :: row_lock[0] == who -> row_lock[0] = 0
    :: else
    fi;
    if
    :: row_lock[1] == who -> row_lock[1] = 0
    :: else
    fi
}

inline complete(e) {
    row[e] = COMPLETED;
    failed[e] = 0;
    told[e] = 0
}

inline have_effect(who, e) {
    if
    :: HAS(in_it[who], e) -> effects[e] = (effects[e] < 2 -> effects[e] + 1 : 2)
    :: else
    fi
}

inline commit(who) {
    if
    :: HAS(in_it[who], 0) -> complete(0)
    :: else
    fi;
    if
    :: HAS(in_it[who], 1) -> complete(1)
    :: else
    fi;
    have_effect(who, 0);
    have_effect(who, 1);
    end_transaction(who)
}

/* The claim's lease is over: its process has vanished, or is frozen. */
inline abandon(e, to) {
    row[e] = to;
    given_up[e] = 1;
    abandoned[e] = 1;
    failed[e] = 1;
    told[e] = 0
}

inline check_event(e) {
    CHECK(B1_one_effect_if_completed_else_none, effects[e] == (row[e] == COMPLETED -> 1 : 0));
    CHECK(B2_one_handler_at_work_for_each_event, AT_WORK(1, e) + AT_WORK(2, e) + AT_WORK(3, e) <= 1)
}

inline check_state() {
    d_step {
        check_event(0);
        check_event(1)
    }
}

/* ---- a process -------------------------------------------------------------------------------------------- */

#define GATHER 0
#define HOLD 1
#define HANDLE 2
#define FAILED 3
#define RELEASE 4
#define UNKNOWN 5

/* No row goes away: it is enough that there is one at this moment. Likewise for a marker, below. */
inline answer_2xx(e) {
    CHECK(B3_a_2xx_and_a_marker_have_a_row, row[e] != ABSENT)
}

inline mark(e) {
    CHECK(B3_a_2xx_and_a_marker_have_a_row, row[e] != ABSENT)
}

/* The process has no more to do with it. */
inline leave(e) {
    CLAIM(e) = 0;
    TAKE_AWAY(alone, e);
    TAKE_AWAY(again, e);
    TAKE_AWAY(before, e)
}

inline answer_processed(e) {
    if
    :: HAS(rest, e) -> CHECK(B4_processed_is_completed, row[e] == COMPLETED); mark(e); answer_2xx(e); leave(e)
    :: else
    fi
}

inline gather() {
    events = 0;
    rest = 0;
    step = GATHER
}

/* The process dies; or it cannot learn what is true, and leaves the rows to recovery. */
inline crash() {
    leave(0);
    leave(1);
    if
    :: transaction[me] == OPEN -> transaction[me] = LEFT
    :: else
    fi;
    gather()
}

/* UPDATE processing, attempt + 1, of a row that is pending or failed, FOR UPDATE SKIP LOCKED */
inline take_over(e) {
    row[e] = PROCESSING;
    attempt[e] = attempt[e] + 1;
    given_up[e] = 0;
    CLAIM(e) = attempt[e];
    alone = alone | (GOES_ALONE(e) << e);
    again = again | (failed[e] << e);
    before = before | (abandoned[e] << e)
}

/* A delivery. Without the lock, or in a full house: INSERT pending. With it: INSERT processing, attempt 1; or the
   take-over. The lock becomes the marker later: until then a duplicate only records. */
inline deliver(e) {
    if
    :: row[e] != ABSENT -> answer_2xx(e) /* by the marker, or by the row */
    :: row[e] == ABSENT -> row[e] = PENDING; answer_2xx(e)
#ifdef M_MARKER_BEFORE_ROW
    :: row[e] == ABSENT -> mark(e) /* ... and its INSERT fails */
#endif
    :: row[e] == ABSENT -> row[e] = PROCESSING; attempt[e] = 1; CLAIM(e) = 1
    :: row[e] == ABSENT -> row[e] = PROCESSING; attempt[e] = 1 /* the reply is lost */
    :: TAKEABLE(e) -> take_over(e)
    fi
}

inline recover(e) {
    take_over(e);
    mark(e);
    if
    :: true
    :: !calm -> leave(e) /* the reply is lost */
    fi
}

inline lock_if_held(e) {
    if
    :: HAS(in_it[me], e) -> row_lock[e] = me
    :: else
    fi
}

/* What HOLD has not returned leaves the batch: it was taken over, or is under somebody's lock of a moment. */
inline leave_if_skipped(e) {
    if
    :: HAS(events, e) && !HAS(rest, e) -> answer_2xx(e); leave(e)
    :: else
    fi
}

inline check_run(e) {
    if
    :: HAS(rest, e) ->
        CHECK(B7_run_under_the_claim_that_the_row_shows, GUARDED(e));
        CHECK(B6_what_was_abandoned_goes_alone, rest != BATCH || !abandoned[e]);
        CHECK(B9_what_has_failed_goes_with_its_like, rest != BATCH || again == 0 || again == BATCH)
    :: else
    fi
}

/* The mark does not fit all of the batch, because the handler has changed the row of one: here, to pending. */
inline commit_what_fits() {
    if
    :: complete(0); row[1] = PENDING
    :: complete(1); row[0] = PENDING
    fi;
    have_effect(me, 0);
    have_effect(me, 1);
    end_transaction(me)
}

inline take_back(e) {
    row[e] = PROCESSING;
    given_up[e] = 0;
    abandoned[e] = HAS(before, e)
}

/* ..._if_held: it waits for the row's lock. A row that was only given up on is taken back first, and may be given up
   again before the second try. What has failed keeps the error, and may enter a batch again, of its like. */
inline settle(e, to) {
    if
    :: GUARDED(e) && row_lock[e] == 0 ->
        CHECK(B5_charged_for_a_run_of_its_own, step != FAILED || events != BATCH);
        row[e] = to;
        failed[e] = failed[e] || step != RELEASE;
        told[e] = told[e] && step == RELEASE;
        leave(e);
        TAKE_AWAY(rest, e)
    :: CAN_TAKE_BACK(e) && row_lock[e] == 0 -> take_back(e)
    :: !GUARDED(e) && (!CAN_TAKE_BACK(e) || !calm) -> answer_2xx(e); leave(e); TAKE_AWAY(rest, e)
    :: !calm -> crash()
    fi
}

/* UPDATE due_at = now + lease, last_error = ...: the leases of a failed batch begin anew. A deadlock leaves no
   error. */
inline renew(e) {
    if
    :: GUARDED(e) && row_lock[e] == 0 ->
        mark(e);
#ifndef M_BATCH_AGAIN
        alone = alone | (1 << e);
#endif
        if
        :: told[e] = 1
        :: !calm
        fi;
        TAKE_AWAY(rest, e) /* last: `e` is the first of the rest, by name */
    :: CAN_TAKE_BACK(e) && row_lock[e] == 0 -> take_back(e)
    :: !GUARDED(e) && (!CAN_TAKE_BACK(e) || !calm) -> answer_2xx(e); leave(e); TAKE_AWAY(rest, e)
    :: !calm -> /* Postgres is unreachable */
        rest = (CLAIM(0) != 0) + 2 * (CLAIM(1) != 0);
        step = RELEASE
    :: !calm -> crash()
    fi
}

/* Whatever begins with !calm is a fault, or a delivery. */
proctype process(byte me) {
    byte step = GATHER;
    byte events = 0;           /* those that go together, a bit each */
    byte rest = 0;             /* those that HOLD has returned, or that are still to be settled */
    byte alone = 0;            /* those that go alone */
    byte again = 0;            /* those that had failed before their claim */
    byte before = 0;           /* those that had been abandoned before their claim */

end:
    do
    :: atomic {
        if
        :: step == GATHER && !calm && CLAIM(0) == 0 -> deliver(0)
        :: step == GATHER && !calm && CLAIM(1) == 0 -> deliver(1)
        :: step == GATHER && CLAIM(0) == 0 && TAKEABLE(0) -> recover(0)
        :: step == GATHER && CLAIM(1) == 0 && TAKEABLE(1) -> recover(1)
        :: step == GATHER && CLAIM(0) != 0 && CLAIM(1) != 0 && alone == 0 && ALIKE -> events = BATCH; step = HOLD
        :: step == GATHER && CLAIM(0) != 0 -> events = 1; mark(0); step = HOLD
        :: step == GATHER && CLAIM(1) != 0 -> events = 2; mark(1); step = HOLD
        :: step == GATHER && !calm && (CLAIM(0) != 0 || CLAIM(1) != 0) -> crash()

        /* BEGIN; SELECT ... WHERE (event_id, attempt) IN ... AND status = 'processing' FOR UPDATE SKIP LOCKED */
        :: step == HOLD && transaction[me] == NONE ->
            rest = HOLDABLE(0) + 2 * HOLDABLE(1);
            if
            :: true
            :: !calm -> TAKE_AWAY(rest, 0) /* under somebody's lock of a moment */
            :: !calm -> TAKE_AWAY(rest, 1)
            fi;
            if
            :: rest == 0 -> leave_if_skipped(0); leave_if_skipped(1); gather()
            :: rest != 0 ->
                transaction[me] = OPEN;
                in_it[me] = rest;
                lock_if_held(0);
                lock_if_held(1);
#ifdef M_HOLD_COUNT_IGNORED
                rest = events;
                in_it[me] = events;
#endif
                if
                :: leave_if_skipped(0); leave_if_skipped(1); check_run(0); check_run(1); step = HANDLE
                :: !calm -> transaction[me] = LEFT; rest = events; step = RELEASE /* the reply is lost */
                fi
            :: !calm -> rest = events; step = RELEASE /* no slot, no connection, or a graceful stop */
            :: !calm -> crash()
            fi

        /* The handler; then UPDATE completed WHERE (event_id, attempt) IN ... AND status = 'processing'; COMMIT */
        :: step == HANDLE ->
            if
            :: transaction[me] == OPEN && !RAISES && CAN_MARK(0) && CAN_MARK(1) ->
                if
                :: commit(me); answer_processed(0); answer_processed(1); gather()
                :: !calm -> commit(me); crash()
                :: !calm -> lock_if_held(0); lock_if_held(1); transaction[me] = SENT; step = UNKNOWN
                :: !calm -> lock_if_held(0); lock_if_held(1); transaction[me] = SENT; crash()
                fi
#ifdef FAIR
            :: transaction[me] == OPEN && RAISES -> end_transaction(me); step = FAILED
#endif
            :: !calm && transaction[me] == OPEN -> /* it raises; its deadline; a deadlock; the mark does not fit all */
                end_transaction(me); step = FAILED
#ifdef M_MARK_COUNT_IGNORED
            :: !calm && transaction[me] == OPEN && !RAISES && rest == BATCH ->
                commit_what_fits(); answer_processed(0); answer_processed(1); gather()
#endif
            :: !calm && transaction[me] == OPEN -> /* Retry of the whole; or a graceful stop */
                end_transaction(me); step = RELEASE
            :: transaction[me] == NONE -> step = FAILED /* the server has ended it, as the next statement finds */
            :: transaction[me] == NONE -> step = UNKNOWN /* ... or the COMMIT */
            :: !calm -> crash()
            fi

#ifdef M_MATES_CHARGED
        :: step == FAILED ->
#else
        :: step == FAILED && events == BATCH -> renew(FIRST(rest))
        :: step == FAILED && events != BATCH ->
#endif
            if
            :: !calm -> settle(FIRST(rest), PENDING)
            :: true -> settle(FIRST(rest), DEAD) /* it was tried for too long */
            fi
        :: step == UNKNOWN -> settle(FIRST(rest), PENDING) /* row by row */
        :: step == RELEASE -> settle(FIRST(rest), PENDING)
        fi;
        if
        :: step >= FAILED && rest == 0 -> gather()
        :: else
        fi;
        check_state()
    }
    od
} /* never reached */

/* ---- the rest of the world -------------------------------------------------------------------------------- */

#define CLAIMED(e) (claims[2 + (e)] == attempt[e] || claims[4 + (e)] == attempt[e] || claims[6 + (e)] == attempt[e])
#ifdef M_LEFT_TO_NOBODY
#define ABANDONED(e) false
#else
#define ABANDONED(e) (row[e] == PROCESSING && row_lock[e] == 0)
#endif
#define SERVER_MOVES(who) (transaction[who] == LEFT || transaction[who] == SENT || (transaction[who] == OPEN && !calm))

/* A transaction ends by a timeout, or as its client is gone; one whose COMMIT was sent ends, this way or that. */
inline server_side_of(who) {
    if
    :: end_transaction(who)
    :: transaction[who] == SENT -> commit(who)
    fi
}

init {
    atomic {
        run process(1);
#if PROCESSES >= 2
        run process(2);
#endif
#if PROCESSES >= 3
        run process(3);
#endif
#ifdef FAIR
        if
        :: true
        :: poison = 1
        fi
#endif
    }
end:
    do
    :: atomic {
        if
        :: SERVER_MOVES(1) -> server_side_of(1)
#if PROCESSES >= 2
        :: SERVER_MOVES(2) -> server_side_of(2)
#endif
#if PROCESSES >= 3
        :: SERVER_MOVES(3) -> server_side_of(3)
#endif
        /* A lease ends. */
        :: ABANDONED(0) && (!calm || !CLAIMED(0)) -> abandon(0, PENDING)
        :: ABANDONED(1) && (!calm || !CLAIMED(1)) -> abandon(1, PENDING)
        :: ABANDONED(0) && !calm -> abandon(0, DEAD) /* once too often */
        :: ABANDONED(1) && !calm -> abandon(1, DEAD)
#ifdef FAIR
        :: !calm -> calm = 1
#endif
        fi;
        check_state()
    }
    od
} /* never reached */

#ifdef FAIR
ltl B8_settles { [] ((calm && row[0] != ABSENT && row[1] != ABSENT) -> <> (SETTLED(0) && SETTLED(1))) }
#endif
