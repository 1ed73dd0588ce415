/*
 * One event under the claim protocol of service/inbox: Redis lock, ledger row, dispatch, recovery.
 *
 * `worker` is one lane of work: deliveries of the event, one after the other, or rounds of recovery. Each of
 * its steps is atomic and is one command to Redis or one statement to Postgres; between two steps anything may
 * happen. `world` is everything else: Redis, the server side of Postgres, time. README.md says what is
 * abstracted away and what each mutant (M_...) takes out.
 *
 * Scenarios: -DLANES=2 -DRECOVERERS=1, -DLANES=1 -DRECOVERERS=2; with -DRESTORE the ledger is restored once;
 * with -DFAIR faults stop at any moment, for the LTL property at the end.
 */

#ifndef LANES
#define LANES 2
#endif
#ifndef RECOVERERS
#define RECOVERERS 1
#endif
#define WORKERS (LANES + RECOVERERS) /* three at most */
#ifndef ATTEMPTS
#define ATTEMPTS 3 /* no take-over beyond this attempt while faults last; the quiet end may go on */
#endif

/* ---- the invariants. With -DONLY=n, number n alone: a mutant has to break the one that it is about ---- */

#ifndef ONLY
#define ONLY 0
#endif

bool I1_a_2xx_has_a_row = true;
bool I2_one_effect_if_completed_else_none = true;
bool I3_one_handler_at_work = true;
bool I4_settled_when_quiet = true;
bool I5_dispatched_under_its_own_claim = true;
bool I6_processed_is_completed = true;
bool I7_a_current_marker_has_a_row = true;

#define CHECK(name, condition) name = (condition); assert(name)
#if ONLY == 0 || ONLY == 1
#define CHECK_I1(condition) CHECK(I1_a_2xx_has_a_row, condition)
#else
#define CHECK_I1(condition) skip
#endif
#if ONLY == 0 || ONLY == 2
#define CHECK_I2(condition) CHECK(I2_one_effect_if_completed_else_none, condition)
#else
#define CHECK_I2(condition) skip
#endif
#if ONLY == 0 || ONLY == 3
#define CHECK_I3(condition) CHECK(I3_one_handler_at_work, condition)
#else
#define CHECK_I3(condition) skip
#endif
#if ONLY == 0 || ONLY == 4
#define CHECK_I4(condition) CHECK(I4_settled_when_quiet, condition)
#else
#define CHECK_I4(condition) skip
#endif
/* Not with a restore: a restored ledger counts attempts anew, so that a claim of before can bear the number of
   one of after. Then the row lock and the status alone carry I2 (-DONLY=5 shows it). */
#if (ONLY == 0 && !defined(RESTORE)) || ONLY == 5
#define CHECK_I5(condition) CHECK(I5_dispatched_under_its_own_claim, condition)
#else
#define CHECK_I5(condition) skip
#endif
#if ONLY == 0 || ONLY == 6
#define CHECK_I6(condition) CHECK(I6_processed_is_completed, condition)
#else
#define CHECK_I6(condition) skip
#endif
#if ONLY == 0 || ONLY == 7
#define CHECK_I7(condition) CHECK(I7_a_current_marker_has_a_row, condition)
#else
#define CHECK_I7(condition) skip
#endif

/* ---- Redis: one key ----------------------------------------------------------------------------------- */

#define EMPTY 0            /* 1, 2, 3: claimed:<the present token of worker 1, 2, 3> */
#define FORGOTTEN 4        /* claimed:<a token that nobody holds any more> */
#define RECORDED(e) (5 + (e))
#define IS_MARKER (key > FORGOTTEN)
#define IS_LOCK_OF_ANOTHER (key != EMPTY && key <= FORGOTTEN)

byte key = EMPTY;
bool marked[2];            /* a marker of this epoch was in Redis at some time: a failover can bring it back */

/* ---- Postgres: one row, its row lock, the handlers' transactions -------------------------------------- */

#define ABSENT 0
#define PENDING 1
#define PROCESSING 2
#define COMPLETED 3
#define FAILED 4
#define DEAD 5

byte row = ABSENT;
byte attempt = 0;
byte row_lock = 0;         /* the worker whose handler's transaction holds the row; 0: free */
bit epoch = 0;             /* the restore changes it */

#define NONE 0             /* no transaction, or the server has ended it */
#define OPEN 1             /* begun, and the handler is at work in it */
#define LEFT 2             /* begun, and its client has given it up or is gone */
#define SENT 3             /* marked, COMMIT sent, the connection lost: may yet commit, or not */
#define AT_WORK(who) (transaction[who] == OPEN || transaction[who] == SENT)
byte transaction[4];

#define INSERT_PENDING 1   /* a statement that its client has given up on: it runs at any later time, or never */
#define INSERT_PROCESSING 2
#define TAKE_OVER_ROW 3
#define SET_FAILED 4
#define SET_DEAD 5
#define SET_PENDING 6
byte late = 0;
byte late_claim = 0;

/* ---- ghosts: the model's own knowledge, no process sees it -------------------------------------------- */

byte effects = 0;          /* commits of a handler's SQL */
byte claimant = 0;         /* who won the claim that the row shows; 0: nobody who is still at it */
byte busy = 0;             /* workers that are not idle */
bit calm = 0;              /* no more faults */
bit rounds = 0;            /* rounds of recovery that the quiet end still allows */

#ifdef FAIR
#define QUIET false
#else
#define QUIET calm
#endif

/* ---- the rules, and the mutants that take them out ---------------------------------------------------- */

#define TAKEABLE (row == PENDING || row == FAILED)

#if defined(M_NO_FENCE) || defined(M_NO_ATTEMPT)
#define NEXT_ATTEMPT (attempt == 0 -> 1 : attempt)
#define HOLDABLE (row == PROCESSING)
#else
#define NEXT_ATTEMPT (attempt + 1)
#define HOLDABLE (row == PROCESSING && attempt == claim)
#endif

#if defined(M_BY_ID)
#define GUARDED(a) (row != ABSENT)
#elif defined(M_NO_FENCE) || defined(M_NO_ATTEMPT)
#define GUARDED(a) (row == PROCESSING)
#else
#define GUARDED(a) (row == PROCESSING && attempt == (a))
#endif

#if defined(M_NO_FENCE) || defined(M_NO_ROW_LOCK)
#define LOCKABLE (transaction[me] == NONE)
#define LOCK_ROW skip
#else
#define LOCKABLE (row_lock == 0)
#define LOCK_ROW row_lock = me
#endif

#ifdef M_ANY_LOCK /* marker and deletion by plain SET and DEL: whoever the lock belongs to */
#define MY_LOCK true
#else
#define MY_LOCK (key == me)
#endif

#ifdef M_DEFERRED_ON_UNKNOWN
#define AFTER_UNKNOWN DEFERRED_OR_IGNORED
#else
#define AFTER_UNKNOWN STOP /* 503 */
#endif

/* What is answered when the ledger has just said that there is no such row (any more). */
#ifdef M_GONE_IS_2XX
#define GONE false
#else
#define GONE (row == ABSENT)
#endif

#define FREE(who) if :: row_lock == who -> row_lock = 0 :: else fi

inline end_transaction(who) {
    transaction[who] = NONE;
    FREE(who)
}

inline leave_transaction(who) {
    if
    :: transaction[who] == OPEN -> transaction[who] = (row_lock == who -> LEFT : NONE)
    :: else
    fi
}

inline commit(who) {
    row = COMPLETED;
    claimant = 0;
    effects = (effects < 2 -> effects + 1 : 2);
    end_transaction(who);
    CHECK_I2(effects == 1)
}

inline take_over(by) {
    row = PROCESSING;
    attempt = NEXT_ATTEMPT;
    claimant = by
}

/* UPDATE ... SET status = to WHERE status = 'processing' AND attempt = a; the row lock is free. */
inline change(to, a) {
    if
    :: GUARDED(a) -> row = to; claimant = 0
    :: else
    fi
}

inline give_up_on(statement) {
    late = statement;
    late_claim = claim
}

inline write_marker(e) {
    key = RECORDED(e);
    marked[e] = true;
    CHECK_I7(e != epoch || row != ABSENT)
}

/* ---- a worker ----------------------------------------------------------------------------------------- */

#define STOP 0             /* passed through: the next step starts from IDLE */
#define IDLE 1
#define ACQUIRE 2
#define SWAP 3
#define RECORD 4
#define CLAIM 5
#define TAKE_OVER 6
#define MARK 7
#define FORGET 8
#define HOLD 9
#define HANDLE 10
#define COMMIT_UNKNOWN 11
#define FIND 12
#define FAIL 13
#define KILL 14
#define RELEASE 15
#define FORGET_MARKER_AND_STOP 16
#define FORGET_MARKER_AND_ANSWER 17
#define ANSWER_2XX 18      /* passed through, as is the next */
#define ANSWER_PROCESSED 19

#define WITHOUT_LOCK (is_lane -> RECORD : STOP)
#define WITH_LOCK (is_lane -> CLAIM : TAKE_OVER)
#define DEFERRED_OR_IGNORED (is_lane -> ANSWER_2XX : STOP)
#define ASKED asked = epoch /* the ledger, or a marker that counts, has just answered us */

inline stop() {
    leave_transaction(me);
    if /* a fresh token next time, so that nobody holds this one any more */
    :: key == me -> key = FORGOTTEN
    :: else
    fi;
    if
    :: claimant == me -> claimant = 0
    :: else
    fi;
    seen = 0;
    claim = 0;
    asked = 0;
    connection_epoch = 0;
    busy--;
    step = IDLE
}

/* Whatever begins with !calm is a fault. A crash leads to START, and so does every answer that is not a 2xx:
   then Stripe delivers again, or it does not. What the process left in Redis and Postgres stays there. */
proctype worker(byte me; bool is_lane) {
    byte step = IDLE;
    byte seen = 0;             /* the marker to be replaced */
    byte claim = 0;            /* the attempt that we have won; 0: none */
    bit asked = 0;             /* the epoch of what was last said to us about the row */
    bit connection_epoch = 0;  /* the epoch read on the connection that our claim was made on */

end:
    do
    :: atomic {
        if
        :: step == IDLE && is_lane && !QUIET -> busy++; step = ACQUIRE
        :: step == IDLE && !is_lane && TAKEABLE && (!QUIET || rounds > 0) -> rounds = 0; busy++; step = ACQUIRE

        /* SET key claimed:<me> NX GET */
        :: step == ACQUIRE ->
            if
            :: key == EMPTY -> key = me; step = WITH_LOCK
#ifdef M_ANSWER_ON_CLAIMED
            :: IS_LOCK_OF_ANOTHER -> ASKED; step = DEFERRED_OR_IGNORED
#else
            :: IS_LOCK_OF_ANOTHER -> step = WITHOUT_LOCK
#endif
#ifdef M_ANY_EPOCH
            :: IS_MARKER && is_lane -> ASKED; step = ANSWER_2XX
#else
            :: IS_MARKER && is_lane && key == RECORDED(epoch) -> ASKED; step = ANSWER_2XX
            :: IS_MARKER && is_lane && key != RECORDED(epoch) -> seen = key; step = SWAP
            :: IS_MARKER && is_lane && !calm -> seen = key; step = SWAP /* we have not confirmed the epoch lately */
#endif
#ifdef M_NX_ONLY
            :: IS_MARKER && !is_lane -> step = STOP
#else
            :: IS_MARKER && !is_lane -> seen = key; step = SWAP
#endif
            :: !calm && key == EMPTY -> key = me; step = WITHOUT_LOCK /* the reply is lost */
            :: !calm -> step = WITHOUT_LOCK /* Redis is away */
            :: !calm -> step = STOP
            fi
        :: step == SWAP ->
            if
            :: key == seen -> key = me; step = WITH_LOCK
            :: key != seen -> step = WITHOUT_LOCK
            :: !calm && key == seen -> key = me; step = WITHOUT_LOCK
            :: !calm -> step = WITHOUT_LOCK
            :: !calm -> step = STOP
            fi;
            seen = 0

        /* By whoever may not dispatch: INSERT pending, attempt 0, ON CONFLICT DO NOTHING; then the row's status. */
        :: step == RECORD ->
            if
            :: row == ABSENT -> row = PENDING; ASKED; step = ANSWER_2XX
            :: row != ABSENT -> ASKED; step = ANSWER_2XX
            :: !calm && row == ABSENT -> row = PENDING; step = STOP
            :: !calm && late == 0 -> give_up_on(INSERT_PENDING); step = STOP
            :: !calm -> step = STOP
            fi

        /* By the lock's holder: INSERT processing, attempt 1, ON CONFLICT DO NOTHING; then the row's status. */
        :: step == CLAIM ->
#ifdef M_MARK_EARLY
            if
            :: key == me -> write_marker(epoch)
            :: else
            fi;
#endif
            if
            :: row == ABSENT ->
                row = PROCESSING; attempt = 1; claimant = me; claim = 1;
                connection_epoch = epoch; ASKED; step = MARK
            :: TAKEABLE -> connection_epoch = epoch; ASKED; step = TAKE_OVER
#ifdef M_LOCK_ALONE
            :: row != ABSENT && !TAKEABLE && row_lock == 0 ->
                row = PROCESSING; claimant = me; claim = attempt;
                connection_epoch = epoch; ASKED; step = MARK
#else
            :: row != ABSENT && !TAKEABLE -> connection_epoch = epoch; ASKED; step = MARK
#endif
            :: !calm && row == ABSENT -> row = PROCESSING; attempt = 1; step = FORGET
            :: !calm && late == 0 -> give_up_on(INSERT_PROCESSING); step = FORGET
            :: !calm -> step = FORGET
#ifdef M_MARK_ON_UNKNOWN
            :: !calm && key == me -> write_marker(epoch); step = STOP
#endif
            :: !calm -> step = STOP
            fi

        /* UPDATE processing, attempt + 1, of what is pending or failed and FOR UPDATE SKIP LOCKED has found */
        :: step == TAKE_OVER ->
            if
            :: TAKEABLE && row_lock == 0 && (calm || attempt < ATTEMPTS) ->
                take_over(me); claim = attempt; connection_epoch = epoch; ASKED; step = MARK
            :: TAKEABLE && row_lock == 0 && !calm && attempt >= ATTEMPTS -> step = STOP /* the bound: we crash */
            :: !TAKEABLE || row_lock != 0 || !calm -> /* skipped: another's, or under somebody's lock of a moment */
                ASKED; step = (is_lane && !GONE -> MARK : FORGET)
            :: !calm && TAKEABLE && row_lock == 0 && attempt < ATTEMPTS -> take_over(0); step = FORGET
            :: !calm && late == 0 -> give_up_on(TAKE_OVER_ROW); step = FORGET
            :: !calm -> step = FORGET
            :: !calm -> step = STOP
            fi

        /* Our own lock becomes the marker. From here on 202 `deferred` may be answered at any moment. */
        :: step == MARK ->
            CHECK_I1(row != ABSENT || asked != epoch);
            if
            :: MY_LOCK -> write_marker(connection_epoch)
            :: !MY_LOCK || !calm
            fi;
            if
            :: claim != 0 -> step = HOLD
            :: claim == 0 -> step = ANSWER_2XX
            :: !calm -> step = STOP
            fi
        :: step == FORGET ->
            if
            :: MY_LOCK -> key = EMPTY
            :: !MY_LOCK || !calm
            fi;
            step = AFTER_UNKNOWN

        /* BEGIN; SELECT ... WHERE status = 'processing' AND attempt = ... FOR UPDATE SKIP LOCKED */
        :: step == HOLD ->
            if
            :: HOLDABLE && LOCKABLE ->
                transaction[me] = OPEN; LOCK_ROW; ASKED;
                CHECK_I3(AT_WORK(1) + AT_WORK(2) + AT_WORK(3) <= 1);
                CHECK_I5(claimant == me);
                if
                :: step = HANDLE
                :: !calm -> leave_transaction(me); step = FAIL /* held, but the reply is lost */
                fi
            :: !HOLDABLE || !LOCKABLE || !calm -> /* skipped: no longer ours, or under somebody's lock of a moment */
                ASKED; step = (GONE -> STOP : DEFERRED_OR_IGNORED)
            :: !calm -> step = FAIL
            :: !calm -> step = RELEASE /* a full house, or a graceful stop */
            :: !calm -> step = STOP
            fi

        /* The handler; then the mark, UPDATE completed WHERE status = 'processing' AND attempt = ...; COMMIT */
        :: step == HANDLE ->
            if
#ifdef M_MARK_APART
            :: transaction[me] == OPEN -> /* the handler's transaction commits, the mark is a statement of its own */
                effects = (effects < 2 -> effects + 1 : 2); end_transaction(me); CHECK_I2(effects == 1);
                if
                :: row = COMPLETED; claimant = 0; ASKED; step = ANSWER_PROCESSED
                :: !calm -> step = STOP
                fi
#else
            :: transaction[me] == OPEN && GUARDED(claim) && (row_lock == me || row_lock == 0) ->
                if
                :: commit(me); ASKED; step = ANSWER_PROCESSED
                :: !calm -> commit(me); step = STOP
                :: !calm -> row_lock = me; transaction[me] = SENT; step = COMMIT_UNKNOWN
                :: !calm -> row_lock = me; transaction[me] = SENT; step = STOP
                fi
            :: transaction[me] == OPEN && !GUARDED(claim) -> step = FAIL; /* never reached: the row lock sees to it */
                end_transaction(me)
#endif
            :: transaction[me] == NONE -> step = FAIL /* the server has ended it, as the next statement finds */
            :: transaction[me] == NONE -> step = COMMIT_UNKNOWN /* ... or the COMMIT */
            :: !calm && transaction[me] == OPEN -> end_transaction(me); step = FAIL /* the handler raises */
            :: !calm && transaction[me] == OPEN -> end_transaction(me); step = KILL /* Permanent */
            :: !calm -> leave_transaction(me); step = FAIL /* its deadline; the backend may live on for a while */
            :: !calm -> leave_transaction(me); step = RELEASE /* a graceful stop */
            :: !calm -> step = STOP
            fi

        /* The connection was lost during COMMIT: fail_if_held, which waits for the old backend; then a read. */
        :: step == COMMIT_UNKNOWN && (row_lock == 0 || !calm) ->
            if
#ifdef M_UNKNOWN_IS_DONE
            :: ASKED; step = ANSWER_PROCESSED
#else
            :: row_lock == 0 && GUARDED(claim) -> row = FAILED; claimant = 0; step = FORGET_MARKER_AND_STOP
            :: row_lock == 0 && !GUARDED(claim) -> step = FIND
            :: !calm && row_lock == 0 -> change(FAILED, claim); step = STOP
            :: !calm && late == 0 -> give_up_on(SET_FAILED); step = STOP
#endif
            :: !calm -> step = STOP
            fi
        :: step == FIND ->
            ASKED;
            if
            :: row == COMPLETED && attempt == claim -> step = ANSWER_PROCESSED
            :: row != COMPLETED || attempt != claim -> step = (GONE -> STOP : DEFERRED_OR_IGNORED)
            :: !calm -> step = STOP
            fi

        /* fail_if_held, kill_if_held, release_if_held; each waits for the row lock */
        :: step == FAIL && (row_lock == 0 || !calm) ->
            if
            :: row_lock == 0 && GUARDED(claim) -> row = FAILED; claimant = 0; step = FORGET_MARKER_AND_STOP
            :: row_lock == 0 && !GUARDED(claim) -> step = STOP
            :: !calm && row_lock == 0 -> change(FAILED, claim); step = STOP
            :: !calm && row_lock == 0 -> change(DEAD, claim); step = STOP /* it was tried for too long */
            :: !calm && late == 0 -> give_up_on(SET_FAILED); step = STOP
            :: !calm && late == 0 -> give_up_on(SET_FAILED); step = RELEASE /* if it never began */
            :: !calm -> step = RELEASE
            :: !calm -> step = STOP
            fi
        :: step == KILL && (row_lock == 0 || !calm) ->
            if
            :: row_lock == 0 -> change(DEAD, claim); ASKED; step = (GONE -> STOP : DEFERRED_OR_IGNORED)
            :: !calm && row_lock == 0 -> change(DEAD, claim); step = STOP
            :: !calm && late == 0 -> give_up_on(SET_DEAD); step = STOP
            :: !calm -> step = STOP
            fi
        :: step == RELEASE && (row_lock == 0 || !calm) ->
            if
            :: row_lock == 0 ->
                change(PENDING, claim); ASKED;
                step = (GONE || !is_lane -> FORGET_MARKER_AND_STOP : FORGET_MARKER_AND_ANSWER)
            :: !calm && row_lock == 0 -> change(PENDING, claim); step = STOP
            :: !calm && late == 0 -> give_up_on(SET_PENDING); step = STOP
            :: !calm -> step = STOP
            fi
        :: step == FORGET_MARKER_AND_STOP || step == FORGET_MARKER_AND_ANSWER ->
            if
            :: key == RECORDED(connection_epoch) -> key = EMPTY
            :: key != RECORDED(connection_epoch) || !calm
            fi;
            step = (step == FORGET_MARKER_AND_ANSWER -> ANSWER_2XX : STOP)
        fi;

        if
        :: step == ANSWER_2XX || step == ANSWER_PROCESSED ->
            CHECK_I1(row != ABSENT || asked != epoch);
            CHECK_I6(step == ANSWER_2XX || row == COMPLETED);
            step = STOP
        :: else
        fi;
        if
        :: step == STOP -> stop()
        :: else
        fi
    }
    od
}

/* ---- the rest of the world ---------------------------------------------------------------------------- */

#define NO_TRANSACTIONS (transaction[1] == NONE && transaction[2] == NONE && transaction[3] == NONE)

inline server_side_of(who) {
    if
    :: transaction[who] == LEFT -> end_transaction(who)
    :: transaction[who] == OPEN -> end_transaction(who)
    :: transaction[who] == SENT -> end_transaction(who)
    :: transaction[who] == SENT -> commit(who)
    fi
}
#define SERVER_MOVES(who) (transaction[who] == LEFT || transaction[who] == SENT || (transaction[who] == OPEN && !calm))

inline run_late() {
    if
    :: late == INSERT_PENDING && row == ABSENT -> row = PENDING
    :: late == INSERT_PROCESSING && row == ABSENT -> row = PROCESSING; attempt = 1
    :: late == TAKE_OVER_ROW && TAKEABLE && row_lock == 0 && attempt < ATTEMPTS -> take_over(0)
    :: late == SET_FAILED && row_lock == 0 -> change(FAILED, late_claim)
    :: late == SET_DEAD && row_lock == 0 -> change(DEAD, late_claim)
    :: late == SET_PENDING && row_lock == 0 -> change(PENDING, late_claim)
    :: true /* never */
    fi;
    late = 0;
    late_claim = 0
}

/* Any round of recovery of any process: a claim past its lease, whose row is not locked, is given up. */
#ifdef M_NEVER_LOOK_BACK
#define ABANDONED false
#else
#define ABANDONED (row == PROCESSING && row_lock == 0)
#endif

init {
    byte left = 2;

    atomic {
        run worker(1, true);
        run worker(2, LANES >= 2);
#if LANES + RECOVERERS >= 3
        run worker(3, false)
#endif
    }
    do
    /* Redis: a flush, an eviction, the end of a life, a late DEL; a SET that arrives late or comes back with a
       failover; a marker that comes back with one */
    :: atomic { !calm && key != EMPTY -> key = EMPTY }
    :: atomic { !calm && key != FORGOTTEN -> key = FORGOTTEN }
    :: atomic { !calm && marked[0] && key != RECORDED(0) -> key = RECORDED(0); CHECK_I7(epoch != 0 || row != ABSENT) }
    /* Postgres: a transaction ends by a timeout, or as its client is gone; one whose COMMIT was sent ends */
    :: atomic { SERVER_MOVES(1) -> server_side_of(1) }
    :: atomic { SERVER_MOVES(2) -> server_side_of(2) }
    :: atomic { SERVER_MOVES(3) -> server_side_of(3) }
    :: atomic { late != 0 -> run_late() }
    /* time: a lease ends */
    :: atomic { ABANDONED && (!calm || claimant == 0) -> row = PENDING; claimant = 0 }
    :: atomic { ABANDONED && !calm -> row = DEAD; claimant = 0 } /* once too often */
    /* an operator replays */
    :: atomic { !calm && (row == FAILED || row == DEAD) -> row = PENDING }
#ifdef RESTORE
    :: atomic { !calm && marked[1] && key != RECORDED(1) -> key = RECORDED(1); CHECK_I7(epoch != 1 || row != ABSENT) }
    :: atomic { !calm && epoch == 0 && row != ABSENT -> /* to any earlier moment; every connection is gone */
        epoch = 1;
        transaction[1] = NONE; transaction[2] = NONE; transaction[3] = NONE;
        row_lock = 0; late = 0; late_claim = 0; claimant = 0;
        if
        :: row = ABSENT; attempt = 0; effects = 0
        :: row = PENDING; attempt = 0; effects = 0
        :: attempt >= 1 -> row = PROCESSING; attempt = 1; effects = 0
        :: attempt >= 1 -> row = FAILED; attempt = 1; effects = 0
        :: attempt >= 2 -> row = PROCESSING; effects = 0
        :: true /* to this very moment */
        fi
    }
#endif
#ifdef FAIR
    :: atomic { !calm -> calm = 1 }
    :: atomic { calm && key == FORGOTTEN -> key = EMPTY } /* the end of a lock's life */
#else
    :: atomic { busy == 0 && NO_TRANSACTIONS && late == 0 -> calm = 1; break }
#endif
    od;

    /* The quiet end: faults have stopped, lives and leases and backoffs have passed; two rounds of recovery. */
    atomic {
        if
        :: key <= FORGOTTEN -> key = EMPTY
        :: else
        fi
    }
    do
    :: left > 0 ->
        atomic {
            if
            :: ABANDONED -> row = PENDING; claimant = 0
            :: else
            fi;
            rounds = 1;
            left--
        };
        busy == 0 && (rounds == 0 || !TAKEABLE)
    :: left == 0 -> break
    od;
    CHECK_I4(row == ABSENT || row == COMPLETED || row == DEAD);
    CHECK_I2(effects == (row == COMPLETED -> 1 : 0))
}

#ifdef FAIR
ltl I4_settles { [] ((calm && row != ABSENT) -> <> (row == COMPLETED || row == DEAD)) }
#endif
