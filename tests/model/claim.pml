/*
 * One event under the claim protocol of service/firstclaim/inbox: Redis lock, ledger row, dispatch, recovery.
 *
 * `worker` is one lane of work: deliveries of the event, one after the other, or rounds of recovery. Each of
 * its steps is atomic and is one command to Redis or one statement to Postgres; between two steps anything may
 * happen. `world` is everything else: Redis, the server side of Postgres, time, an operator. README.md says what
 * is abstracted away and what each mutant (M_...) takes out.
 *
 * Scenarios: LANES that deliver and RECOVERERS; with -DRESTORE the ledger is restored once; with -DFAIR faults
 * stop at any moment, for the LTL property at the end.
 */

#ifndef LANES
#define LANES 2
#endif
#ifndef RECOVERERS
#define RECOVERERS 1
#endif
#define WORKERS (LANES + RECOVERERS) /* four at most */
#ifndef ATTEMPTS
#define ATTEMPTS 3 /* no take-over beyond this attempt while faults last; the quiet end may go on */
#endif

/* ---- the invariants: never true themselves, so that pan names the one that an assertion is about --------- */

bool I1_a_2xx_has_a_row = false;
bool I2_one_effect_if_completed_else_none = false;
bool I3_one_handler_at_work = false;
bool I4_settled_when_quiet = false;
bool I5_dispatched_under_both_claims = false;
bool I6_processed_is_completed_or_ignored = false;
bool I7_a_current_marker_has_a_row = false;
bool I8_what_a_wanting_build_acknowledged_is_not_ignored = false;

#define CHECK(name, condition) assert(name || (condition))

/* Where a 2xx is given, or may be from now on. What the ledger said before it was restored is waived. */
#define CHECK_I1 CHECK(I1_a_2xx_has_a_row, row != ABSENT || asked != epoch)

/* Where `processed: true` is decided. */
#define CHECK_I6 CHECK(I6_processed_is_completed_or_ignored, row == COMPLETED || row == IGNORED)

/* Where a handler starts. Not with a restore: a restored ledger counts attempts anew, so that a claim of before can
   bear the number of one of after. Then the row lock and the status alone carry I2 and I3. */
#ifdef RESTORE
#define CHECK_I5 skip
#else
#define CHECK_I5 CHECK(I5_dispatched_under_both_claims, locked && claimant == me)
#endif

/* ---- Redis: one key ----------------------------------------------------------------------------------- */

#define EMPTY 0            /* 1 to 4: claimed:<the present token of that worker> */
#define FORGOTTEN 5        /* claimed:<a token that nobody holds any more> */
#define RECORDED(e) (6 + (e))
#define IS_MARKER (key > FORGOTTEN)
#define IS_LOCK_OF_ANOTHER (key != EMPTY && key <= FORGOTTEN)

byte key = EMPTY;
/* A marker of this epoch may have been sent, so that it may come at any time: late, or back with a failover. */
#ifdef M_UNWANTED_IS_MARKED
#define MAY_BE_MARKED(e) (row != ABSENT || epoch > (e))
#else
#define MAY_BE_MARKED(e) ((row != ABSENT && row != IGNORED) || epoch > (e)) /* an ignored event is never marked */
#endif

/* ---- Postgres: one row, its row lock, the handlers' transactions -------------------------------------- */

#define ABSENT 0
#define PENDING 1          /* or failed: nothing here tells the two apart */
#define PROCESSING 2
#define COMPLETED 3
#define DEAD 4
#define IGNORED 5

byte row = ABSENT;
byte attempt = 0;
bit given_up = 0;          /* abandoned since the attempt was claimed: its count is higher than the holder knows */
byte row_lock = 0;         /* the worker whose handler's transaction holds the row; 0: free */
bit epoch = 0;             /* the restore changes it */

#define NONE 0             /* no transaction, or the server has ended it */
#define OPEN 1             /* begun, and the handler is at work in it */
#define LEFT 2             /* begun, and its client has given it up or is gone */
#define SENT 3             /* marked, COMMIT sent, the connection lost: may yet commit, or not */
#define AT_WORK(who) (transaction[who] == OPEN || transaction[who] == SENT)
byte transaction[5];

/* A statement that its client has given up on: it runs at any later time, or never. Of which status it was to set only
   the kind is kept: whatever one of that kind may do, it may. */
#define INSERT 1
#define TAKE_OVER_ROW 2
#define CHANGE 3
byte late = 0;
byte late_claim = 0;
/* It would change nothing, now or ever: no row goes away, and an attempt only comes back after it was given up on. */
#define LATE_IN_VAIN \
    ((late == INSERT && row != ABSENT) || (late == TAKE_OVER_ROW && row == COMPLETED) || \
     (late == CHANGE && !GUARDED(late_claim) && !CAN_TAKE_BACK(late_claim)))

/* ---- ghosts: the model's own knowledge, no process sees it -------------------------------------------- */

byte effects = 0;          /* commits of a handler's SQL */
byte claimant = 0;         /* who won the claim that the row shows; 0: nobody who is still at it */
byte busy = 0;             /* workers that are not idle */
bit promised = 0;          /* a process with a handler for the event has answered 2xx */
bit calm = 0;              /* no more faults */
bit rounds = 0;            /* rounds of recovery that the quiet end still allows */

#ifdef FAIR
#define QUIET false
#else
#define QUIET calm
#endif

/* ---- the rules, and the mutants that take them out ---------------------------------------------------- */

#define TAKEABLE (row == PENDING)
#define TAKEABLE_BY_ME (TAKEABLE || (is_lane && row == IGNORED)) /* a delivery that wants it, and never recovery */
#define SETTLED (row == COMPLETED || row == DEAD || row == IGNORED)

#if defined(M_NO_FENCE) || defined(M_NO_ATTEMPT)
#define NEXT_ATTEMPT (attempt == 0 -> 1 : attempt)
#define HOLDABLE (row == PROCESSING)
#else
#define NEXT_ATTEMPT (attempt + 1)
#define HOLDABLE (row == PROCESSING && attempt == claim)
#endif

#if defined(M_STATE_BY_ID_ALONE)
#define GUARDED(a) (row != ABSENT)
#define CAN_TAKE_BACK(a) false
#elif defined(M_NO_FENCE) || defined(M_NO_ATTEMPT)
#define GUARDED(a) (row == PROCESSING)
#define CAN_TAKE_BACK(a) (given_up)
#else
#define GUARDED(a) (row == PROCESSING && attempt == (a))
#ifdef M_TAKE_BACK_FROM_ANOTHER
#define CAN_TAKE_BACK(a) (given_up)
#else
#define CAN_TAKE_BACK(a) (given_up && attempt == (a)) /* and then it is pending, or dead */
#endif
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

#ifdef M_DISPATCH_WITHOUT_LOCK
#define WITHOUT_LOCK WITH_LOCK
#define WITHOUT_REDIS WITH_LOCK
#else
#ifdef M_UNWANTED_IS_INSERTED_BESIDE_A_LOCK
#define WITHOUT_LOCK WITHOUT_REDIS
#else
#define WITHOUT_LOCK (is_lane -> (wants -> RECORD : FIND_UNWANTED) : STOP)
#endif
#define WITHOUT_REDIS (is_lane -> (wants -> RECORD : IGNORE) : STOP)
#endif
#define WITH_LOCK (is_lane -> (wants -> CLAIM : IGNORE) : TAKE_OVER)
#define DEFERRED_OR_IGNORED (is_lane -> ANSWER_2XX : STOP)

#ifdef M_DEFERRED_ON_UNKNOWN
#define AFTER_FORGETTING DEFERRED_OR_IGNORED
#else
#define AFTER_FORGETTING STOP /* 503 */
#endif

#ifdef M_UNWANTED_IS_MARKED
#define AFTER_IGNORING MARK
#else
#define AFTER_IGNORING FORGET_AND_ANSWER
#endif

#define ASKED asked = epoch /* the ledger has just said that there is such a row, or a marker that counts has */
#define CAN_SETTLE (row_lock == 0 || !calm)

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

inline have_effect() {
    effects = (effects < 2 -> effects + 1 : 2)
}

inline commit(who) {
    row = COMPLETED;
    claimant = 0;
    have_effect();
    end_transaction(who)
}

inline take_over(by) {
    row = PROCESSING;
    attempt = NEXT_ATTEMPT;
    given_up = 0;
    claimant = by
}

inline take_back(by) {
    row = PROCESSING;
    given_up = 0;
    claimant = by
}

inline abandon(to) {
    row = to;
    given_up = 1;
    claimant = 0
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

/* After every step and every move of the world. */
inline check_state() {
    d_step {
        CHECK(I2_one_effect_if_completed_else_none, effects == (row == COMPLETED -> 1 : 0));
        CHECK(I3_one_handler_at_work, AT_WORK(1) + AT_WORK(2) + AT_WORK(3) + AT_WORK(4) <= 1);
        CHECK(I7_a_current_marker_has_a_row, key != RECORDED(epoch) || row != ABSENT);
        CHECK(I8_what_a_wanting_build_acknowledged_is_not_ignored, !(promised && row == IGNORED));
        if
        :: late != 0 && LATE_IN_VAIN -> late = 0; late_claim = 0
        :: else
        fi
    }
}

/* ---- a worker ----------------------------------------------------------------------------------------- */

#define STOP 0             /* passed through: the next step starts from IDLE */
#define IDLE 1
#define ACQUIRE 2
#define SWAP 3
#define RECORD 4
#define CLAIM 5
#define TAKE_OVER 6
#define IGNORE 7
#define MARK 8
#define FORGET 9
#define HOLD 10
#define HANDLE 11
#define COMMIT_UNKNOWN 12
#define FIND 13
#define FAIL 14
#define KILL 15
#define RELEASE 16
#define FORGET_MARKER_AND_STOP 17
#define FORGET_MARKER_AND_ANSWER 18
#define UNSETTLED 19       /* passed through, as are the next two */
#define ANSWER_2XX 20
#define ANSWER_PROCESSED 21
#define TAKE_OVER_IGNORED 22
#define LOOK_AGAIN 23
#define FIND_UNWANTED 24
#define FORGET_AND_ANSWER 25

/* ..._if_held waits for the row's lock. If the row is not ours and was only given up on, we take it back and try once
   more. Of each of these statements the reply may be lost, or it arrives late, or it never does. */
inline settle(to, if_held, if_not) {
    if
    :: tries != 1 && row_lock == 0 && GUARDED(claim) -> row = to; claimant = 0; ASKED; step = if_held
    :: tries == 0 && row_lock == 0 && !GUARDED(claim) && CAN_TAKE_BACK(claim) -> tries = 1
    :: tries == 0 && row_lock == 0 && !GUARDED(claim) && !CAN_TAKE_BACK(claim) -> step = if_not
    :: tries == 1 && row_lock == 0 && CAN_TAKE_BACK(claim) -> take_back(me); tries = 2
    :: tries == 1 && row_lock == 0 && !CAN_TAKE_BACK(claim) -> step = if_not
    :: tries == 2 && row_lock == 0 && !GUARDED(claim) -> step = if_not
    :: !calm && tries != 1 && row_lock == 0 -> change(to, claim); step = UNSETTLED
    :: !calm && tries == 1 && row_lock == 0 && CAN_TAKE_BACK(claim) -> take_back(0); step = UNSETTLED
    :: !calm && late == 0 -> give_up_on(CHANGE); step = UNSETTLED
    :: !calm -> step = UNSETTLED
    fi;
    if
    :: step == if_held || step == if_not || step == UNSETTLED -> tries = 0
    :: else
    fi
}

/* A 2xx of a process that wants the event. What the ledger said before it was restored is waived. */
inline promise() {
    if
    :: is_lane && wants && asked == epoch -> promised = 1
    :: else
    fi
}

/* It is not used any more: nobody holds it. */
inline forget_token() {
    if
    :: key == me -> key = FORGOTTEN
    :: else
    fi
}

inline stop() {
    d_step {
        leave_transaction(me);
        forget_token();
        if
        :: claimant == me -> claimant = 0
        :: else
        fi;
        seen = 0;
        claim = 0;
        tries = 0;
        locked = 0;
        asked = 0;
        wants = 0;
        connection_epoch = 0;
        busy--;
        step = IDLE
    }
}

/* Whatever begins with !calm is a fault, or a process of another build. A crash leads to STOP, and so does every answer
   that is not a 2xx: then Stripe delivers again, or it does not. What the process left in Redis and Postgres stays. */
proctype worker(byte me; bool is_lane) {
    byte step = IDLE;
    byte seen = 0;             /* the value to be replaced */
    byte claim = 0;            /* the attempt that we have won; 0: none */
    byte tries = 0;            /* of a change: 1: it found nothing of ours; 2: we have taken the row back */
    bit wants = 0;             /* this process has a handler for the event; another build on the ledger may not */
    bit locked = 0;            /* a ghost: Redis has said that the lock is ours */
    bit asked = 0;             /* a ghost: the epoch of what was last said to us about the row */
    bit connection_epoch = 0;  /* the epoch read on the connection that our claim was made on */

end:
    do
    :: atomic {
        if
        :: step == IDLE && is_lane && !QUIET ->
            busy++; ASKED; step = ACQUIRE;
            if
            :: wants = 1
            :: !calm && me == 1 /* a process of another build; one such delivery at a time */
            fi
        :: step == IDLE && !is_lane && TAKEABLE && (!QUIET || rounds > 0) -> rounds = 0; busy++; ASKED; step = ACQUIRE

        /* SET key claimed:<me> NX GET */
        :: step == ACQUIRE ->
            if
            :: key == EMPTY -> key = me; locked = 1; step = WITH_LOCK
#ifdef M_200_ON_CLAIMED
            :: IS_LOCK_OF_ANOTHER -> step = DEFERRED_OR_IGNORED
#else
            :: IS_LOCK_OF_ANOTHER -> step = WITHOUT_LOCK
#endif
            :: IS_LOCK_OF_ANOTHER && !calm -> seen = key; step = SWAP /* PTTL says: left over */
#ifdef M_ANY_EPOCH
            :: IS_MARKER && is_lane -> step = ANSWER_2XX
#else
            :: IS_MARKER && is_lane && key == RECORDED(epoch) -> ASKED; step = ANSWER_2XX
            :: IS_MARKER && is_lane && key != RECORDED(epoch) -> seen = key; step = SWAP /* only after a restore */
            :: IS_MARKER && is_lane && key != RECORDED(epoch) && !calm -> /* ... which we have not noticed yet */
                asked = !epoch; step = ANSWER_2XX /* only after a restore */
            :: IS_MARKER && is_lane && !calm -> seen = key; step = SWAP /* we have not confirmed the epoch lately */
#endif
#ifdef M_RECOVERY_BY_NX
            :: IS_MARKER && !is_lane -> step = STOP
#else
            :: IS_MARKER && !is_lane -> seen = key; step = SWAP
#endif
            :: !calm && key == EMPTY -> key = FORGOTTEN; step = WITHOUT_REDIS /* the reply is lost */
            :: !calm -> step = WITHOUT_REDIS /* Redis is unreachable */
            :: !calm -> step = STOP
            fi
        :: step == SWAP ->
            if
            :: key == seen -> key = me; locked = 1; step = WITH_LOCK
            :: key != seen -> step = WITHOUT_LOCK
            :: !calm && key == seen -> key = FORGOTTEN; step = WITHOUT_REDIS
            :: !calm -> step = WITHOUT_REDIS
            :: !calm -> step = STOP
            fi;
            seen = 0

        /* By whoever may not dispatch: INSERT pending, attempt 0, ON CONFLICT DO NOTHING; then the row's status. Two
           statements: but no row ever goes away, so that the second alone says what the answer rests on. */
        :: step == RECORD ->
            if
            :: row == ABSENT -> row = PENDING; ASKED; step = ANSWER_2XX
#ifdef M_IGNORED_IS_OWNED
            :: row != ABSENT -> ASKED; step = ANSWER_2XX
#else
            :: row != ABSENT && row != IGNORED -> ASKED; step = ANSWER_2XX
            :: row == IGNORED -> step = STOP /* 503 */
#endif
            :: !calm && row == ABSENT -> row = PENDING; step = STOP
            :: !calm && late == 0 -> give_up_on(INSERT); step = STOP
            :: !calm -> step = STOP
            fi

        /* By a process that does not want it, with or without the lock: INSERT ignored, ON CONFLICT DO NOTHING; then the
           status. An unfinished row is its recorder's: 202. */
        :: step == IGNORE ->
#ifdef M_UNWANTED_IS_MARKED
            connection_epoch = epoch;
#endif
            if
            :: row == ABSENT -> row = IGNORED; attempt = 1; ASKED; CHECK_I6; step = AFTER_IGNORING
#ifdef M_UNWANTED_IS_SETTLED
            :: TAKEABLE && row_lock == 0 -> row = IGNORED; ASKED; step = AFTER_IGNORING
#endif
            :: row != ABSENT -> ASKED; step = AFTER_IGNORING
            :: !calm && row == ABSENT -> row = IGNORED; attempt = 1; step = FORGET
            :: !calm && late == 0 -> give_up_on(INSERT); step = FORGET
            :: !calm -> step = FORGET
            :: !calm -> step = STOP
            fi
        :: step == FIND_UNWANTED -> /* another has the lock, and may want it */
            if
            :: row == ABSENT -> step = STOP /* 503 */
            :: row != ABSENT -> ASKED; step = ANSWER_2XX
            :: !calm -> step = STOP
            fi

        /* By the lock's holder: INSERT processing, attempt 1, ON CONFLICT DO NOTHING; then the status. */
        :: step == CLAIM ->
#ifdef M_MARKER_BEFORE_COMMIT
            if
            :: key == me -> key = RECORDED(epoch)
            :: else
            fi;
#endif
            connection_epoch = epoch;
            if
            :: row == ABSENT -> row = PROCESSING; attempt = 1; claimant = me; claim = 1; ASKED; step = MARK
            :: TAKEABLE -> ASKED; step = TAKE_OVER
#ifdef M_IGNORED_IS_OWNED
            :: row == IGNORED -> ASKED; step = MARK
#else
            :: row == IGNORED -> step = TAKE_OVER_IGNORED
#endif
#ifdef M_LOCK_ALONE
            :: row != ABSENT && !TAKEABLE && row != IGNORED && row_lock == 0 ->
                take_back(me); claim = attempt; ASKED; step = MARK
#else
            :: row != ABSENT && !TAKEABLE && row != IGNORED -> ASKED; step = MARK
#endif
            :: !calm && row == ABSENT -> row = PROCESSING; attempt = 1; step = FORGET
            :: !calm && late == 0 -> give_up_on(INSERT); step = FORGET
            :: !calm -> step = FORGET
            :: !calm -> step = STOP
            fi

        /* UPDATE processing, attempt + 1, of what is pending or failed (by a delivery that wants it also of what is
           ignored) and FOR UPDATE SKIP LOCKED has found. Who skips it does not learn why: a lane goes by what it read
           before; if that was `ignored`, it looks again. */
        :: step == TAKE_OVER || step == TAKE_OVER_IGNORED ->
            if
            :: TAKEABLE_BY_ME && row_lock == 0 && (calm || attempt < ATTEMPTS) ->
                take_over(me); claim = attempt; connection_epoch = epoch; ASKED; step = MARK
            :: TAKEABLE_BY_ME && row_lock == 0 && !calm && attempt >= ATTEMPTS -> step = STOP /* the bound: we crash */
            :: !TAKEABLE_BY_ME || row_lock != 0 || !calm -> /* skipped: another's, or under somebody's lock of a moment */
                step = (is_lane -> (step == TAKE_OVER_IGNORED -> LOOK_AGAIN : MARK) : FORGET)
            :: !calm && TAKEABLE_BY_ME && row_lock == 0 && attempt < ATTEMPTS -> take_over(0); step = FORGET
            :: !calm && late == 0 -> give_up_on(TAKE_OVER_ROW); step = FORGET
            :: !calm -> step = FORGET
            :: !calm -> step = STOP
            fi

        :: step == LOOK_AGAIN ->
            if
#ifdef M_SKIPPED_IS_OWNED
            :: row == IGNORED -> ASKED; step = MARK
#else
            :: row == IGNORED || row == ABSENT -> step = FORGET /* 503 */
#endif
            :: row != IGNORED && row != ABSENT -> ASKED; step = MARK
            :: !calm -> step = FORGET
            :: !calm -> step = STOP
            fi

        /* Our own lock becomes the marker. From here on 202 `deferred` may be answered at any moment. */
        :: step == MARK ->
            CHECK_I1;
            promise();
            if
            :: MY_LOCK -> key = RECORDED(connection_epoch)
            :: !MY_LOCK || !calm
            fi;
            forget_token();
            if
            :: claim != 0 -> step = HOLD
            :: claim == 0 -> step = DEFERRED_OR_IGNORED
            :: claim != 0 && !calm && !is_lane -> step = KILL /* its payload has expired, or cannot be read */
            :: !calm -> step = FORGET /* a graceful stop */
            :: !calm -> step = STOP
            fi
        :: step == FORGET || step == FORGET_AND_ANSWER ->
            if
#ifdef M_MARKER_OVER_LOST_COMMIT
            :: MY_LOCK -> key = RECORDED(epoch)
#else
            :: MY_LOCK -> key = EMPTY
#endif
            :: !MY_LOCK || !calm
            fi;
            step = (step == FORGET_AND_ANSWER -> ANSWER_2XX : AFTER_FORGETTING)

        /* BEGIN; SELECT ... WHERE status = 'processing' AND attempt = ... FOR UPDATE SKIP LOCKED */
        :: step == HOLD ->
            if
            :: HOLDABLE && LOCKABLE ->
                transaction[me] = OPEN; LOCK_ROW; ASKED; CHECK_I5;
                if
                :: step = HANDLE
                :: !calm -> leave_transaction(me); step = RELEASE /* held, but the reply is lost */
                fi
            :: !HOLDABLE || !LOCKABLE || !calm -> /* skipped: no longer ours, or under somebody's lock of a moment */
                step = DEFERRED_OR_IGNORED
            :: !calm -> step = RELEASE /* a full house, no connection, no reply, or a graceful stop */
            :: !calm -> step = STOP
            fi

        /* The handler; then the mark, UPDATE completed WHERE status = 'processing' AND attempt = ...; COMMIT */
        :: step == HANDLE ->
            if
#ifdef M_MARK_APART
            :: transaction[me] == OPEN -> /* the handler's transaction commits, the mark is a statement of its own */
                have_effect(); end_transaction(me);
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
            :: transaction[me] == OPEN && !GUARDED(claim) ->
                transaction[me] = NONE; step = KILL /* never reached: the row lock sees to it */
#endif
            :: transaction[me] == NONE -> step = FAIL /* the server has ended it, as the next statement finds */
            :: transaction[me] == NONE -> step = COMMIT_UNKNOWN /* ... or the COMMIT */
            :: !calm && transaction[me] == OPEN -> end_transaction(me); step = FAIL /* the handler raises */
            :: !calm && transaction[me] == OPEN -> end_transaction(me); step = KILL /* Permanent */
            :: !calm -> leave_transaction(me); step = FAIL /* its deadline; the backend may live on for a while */
            :: !calm -> leave_transaction(me); step = RELEASE /* a graceful stop */
            :: !calm -> step = STOP
            fi

        /* fail_if_held: 500, when the ledger has it. After a connection lost during COMMIT the same, which waits for
           the old backend; and then a read. */
#ifdef M_UNKNOWN_IS_DONE
        :: step == COMMIT_UNKNOWN -> ASKED; step = ANSWER_PROCESSED
#else
        :: step == COMMIT_UNKNOWN && CAN_SETTLE -> settle(PENDING, FORGET_MARKER_AND_STOP, FIND)
#endif
        :: step == FAIL && CAN_SETTLE -> settle(PENDING, FORGET_MARKER_AND_STOP, STOP)
        :: (step == FAIL || step == COMMIT_UNKNOWN) && !calm && row_lock == 0 ->
            change(DEAD, claim); step = UNSETTLED /* it was tried for too long */
        :: step == FIND ->
            if
            :: row == COMPLETED && attempt == claim -> ASKED; step = ANSWER_PROCESSED
            :: row != ABSENT && (row != COMPLETED || attempt != claim) -> ASKED; step = DEFERRED_OR_IGNORED
#ifdef M_GONE_IS_2XX
            :: row == ABSENT -> ASKED; step = DEFERRED_OR_IGNORED /* only after a restore */
#else
            :: row == ABSENT -> step = STOP /* only after a restore */
#endif
            :: !calm -> step = UNSETTLED
            fi
        :: step == KILL && CAN_SETTLE -> settle(DEAD, DEFERRED_OR_IGNORED, DEFERRED_OR_IGNORED)
        :: step == RELEASE && CAN_SETTLE ->
            settle(PENDING, FORGET_MARKER_AND_ANSWER, FORGET_MARKER_AND_ANSWER)
        :: step == FORGET_MARKER_AND_STOP || step == FORGET_MARKER_AND_ANSWER ->
            if
#ifdef M_MARKER_KEPT_AFTER_FAILURE
            :: key == RECORDED(connection_epoch)
#else
            :: key == RECORDED(connection_epoch) -> key = EMPTY
#endif
            :: key != RECORDED(connection_epoch) || !calm
            fi;
            step = (step == FORGET_MARKER_AND_ANSWER -> DEFERRED_OR_IGNORED : STOP)
        fi;

        if /* a crash, or 503; or a claim that never began, or a graceful stop: then it is released */
        :: step == UNSETTLED -> step = STOP
        :: step == UNSETTLED -> step = RELEASE
        :: step == ANSWER_2XX -> CHECK_I1; promise(); step = STOP
        :: step == ANSWER_PROCESSED -> CHECK_I1; CHECK_I6; promise(); step = STOP
        :: else
        fi;
        if
        :: step == STOP -> stop()
        :: else
        fi;
        check_state()
    }
    od
} /* never reached */

/* ---- the rest of the world ---------------------------------------------------------------------------- */

#define NO_TRANSACTIONS (transaction[1] + transaction[2] + transaction[3] + transaction[4] == NONE)

/* A transaction ends by a timeout, or as its client is gone; one whose COMMIT was sent ends, this way or that. */
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
    :: late == INSERT && row == ABSENT -> row = PENDING
    :: late == INSERT && row == ABSENT -> row = PROCESSING; attempt = 1
    :: late == INSERT && row == ABSENT -> row = IGNORED; attempt = 1
    :: late == TAKE_OVER_ROW && (TAKEABLE || row == IGNORED) && row_lock == 0 && attempt < ATTEMPTS -> take_over(0)
    :: late == CHANGE && row_lock == 0 -> change(DEAD, late_claim)
    :: late == CHANGE && row_lock == 0 -> change(PENDING, late_claim)
    :: late == CHANGE && row_lock == 0 && CAN_TAKE_BACK(late_claim) -> take_back(0)
    :: true /* never */
    fi;
    late = 0;
    late_claim = 0
}

inline set_back(to, as_attempt) {
    row = to;
    attempt = as_attempt;
    given_up = 0;
    effects = 0
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
        run worker(1, LANES >= 1);
#if WORKERS >= 2
        run worker(2, LANES >= 2);
#endif
#if WORKERS >= 3
        run worker(3, LANES >= 3);
#endif
#if WORKERS >= 4
        run worker(4, LANES >= 4)
#endif
    }
    do
    :: atomic {
        if
        /* Redis: a flush, an eviction, the end of a life, a late DEL; a SET that arrives late or comes back with a
           failover; a marker that does */
        :: !calm && key != EMPTY -> key = EMPTY
        :: !calm && key != FORGOTTEN -> key = FORGOTTEN
        :: !calm && MAY_BE_MARKED(0) && key != RECORDED(0) -> key = RECORDED(0)
        /* Postgres */
        :: SERVER_MOVES(1) -> server_side_of(1)
        :: SERVER_MOVES(2) -> server_side_of(2)
#if WORKERS >= 3
        :: SERVER_MOVES(3) -> server_side_of(3)
#endif
#if WORKERS >= 4
        :: SERVER_MOVES(4) -> server_side_of(4)
#endif
        :: late != 0 -> run_late()
        /* time: a lease ends */
        :: ABANDONED && (!calm || claimant == 0) -> abandon(PENDING)
        :: ABANDONED && !calm -> abandon(DEAD) /* once too often */
        /* an operator replays */
        :: !calm && (row == DEAD || row == IGNORED || given_up) -> row = PENDING; given_up = 0
#ifdef RESTORE
        :: !calm && epoch == 1 && MAY_BE_MARKED(1) && key != RECORDED(1) -> key = RECORDED(1)
        :: !calm && epoch == 0 && row != ABSENT -> /* to any earlier moment; every connection is gone */
            epoch = 1; promised = 0;
            transaction[1] = NONE; transaction[2] = NONE; transaction[3] = NONE; transaction[4] = NONE;
            row_lock = 0; late = 0; late_claim = 0; claimant = 0;
            if
            :: set_back(ABSENT, 0)
            :: set_back(PENDING, 0)
            :: attempt >= 1 -> set_back(PROCESSING, 1)
            :: attempt >= 1 -> set_back(PENDING, 1)
            :: attempt >= 2 -> set_back(PROCESSING, attempt)
            :: true /* to this very moment */
            fi
#endif
#ifdef FAIR
        :: !calm -> calm = 1
        :: calm && key == FORGOTTEN -> key = EMPTY /* the end of a lock's life */
#endif
        fi;
        check_state()
    }
#ifndef FAIR
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
            :: ABANDONED -> abandon(PENDING)
            :: else
            fi;
            rounds = 1;
            left--
        };
        busy == 0 && (rounds == 0 || !TAKEABLE)
    :: left == 0 -> break
    od;
    CHECK(I4_settled_when_quiet, row == ABSENT || SETTLED)
}

#ifdef FAIR
ltl I4_settles { [] ((calm && row != ABSENT) -> <> SETTLED) }
#endif
